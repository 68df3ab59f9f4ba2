"""What the draft worker feeds its model and proposes, as commits come in."""

import pytest

from speculation.draft_lines import DraftLine
from speculation.drafter import MAX_LOOKAHEAD, CommitMismatch, DrafterSession
from speculation.fingerprint import fingerprint
from speculation.guesses import guess_of
from speculation.messages import Commit, OpenDraft, Proposal, Sampling


def session(
    prompt: list[int], lookahead: int = 4, max_length: int = 0, max_context: int = 100, max_branches: int = 0
) -> DrafterSession:
    return DrafterSession(OpenDraft(tuple(prompt), Sampling(), lookahead, max_length, max_branches), 50, max_context)


def draft(
    drafter: DrafterSession, token_id: int, runner_up: int = 49, *, line: DraftLine | None = None, gap: float = 0.1
) -> list[int]:
    """One step of the model at the end of a line, the main one if none is given: returns what it was fed."""
    line = line or drafter.main
    fed = drafter.uncached(line)
    line.num_cached += len(fed)
    drafter.drafted(line, guess_of(token_id, [(runner_up, gap)]))
    return fed


def proposal_of(drafter: DrafterSession, flush_tokens: int = 1) -> Proposal | None:
    """The main line's news."""
    proposals = [one for one in drafter.take_proposals(flush_tokens) if not one.is_branch]
    return proposals[0] if proposals else None


def begin_branch(drafter: DrafterSession, start: int) -> DraftLine:
    """A branch in place of the main line's guess number ``start``."""
    return drafter.grow(next(one for one in drafter.growths() if one.line is None and one.start == start))


def wants_draft(drafter: DrafterSession) -> bool:
    return any(growth.is_main for growth in drafter.growths())


def test_feeds_the_prompt_once_and_then_its_own_drafts() -> None:
    drafter = session([1, 2])
    assert [draft(drafter, 3), draft(drafter, 4), draft(drafter, 5)] == [[1, 2], [3], [4]]
    proposal = proposal_of(drafter)
    assert proposal is not None
    assert (proposal.prefix_length, proposal.prefix_fingerprint) == (2, fingerprint([1, 2]))
    assert proposal.token_ids == (3, 4, 5)
    assert proposal.confidences == (0.5, 0.5, 0.5)  # nothing is known yet, and the gap is small
    assert proposal_of(drafter) is None


def test_what_is_drafted_later_goes_out_addressed_by_all_that_precedes_it() -> None:
    drafter = session([1])
    draft(drafter, 2)
    proposal_of(drafter)
    draft(drafter, 3)
    drafter.commit(Commit(1, (2,)))
    proposal = proposal_of(drafter)
    assert proposal is not None
    assert (proposal.prefix_length, proposal.prefix_fingerprint, proposal.token_ids) == (2, fingerprint([1, 2]), (3,))


def test_an_agreeing_commit_keeps_chain_and_cache() -> None:
    drafter = session([1])
    for token in (2, 3, 4):
        draft(drafter, token)
    drafter.commit(Commit(1, (2, 3)))
    assert (len(drafter.main), drafter.main.num_cached) == (1, 3)
    assert draft(drafter, 5) == [4]


def test_a_miss_drops_the_chain_at_once_and_keeps_only_the_agreeing_cache() -> None:
    drafter = session([1])
    for token in (2, 3, 4):
        draft(drafter, token)
    drafter.commit(Commit(1, (2, 9)))
    assert (len(drafter.main), drafter.main.num_unsent, drafter.main.num_cached) == (0, 0, 2)
    assert draft(drafter, 5) == [9]
    proposal = proposal_of(drafter)
    assert proposal is not None
    assert (proposal.prefix_length, proposal.prefix_fingerprint) == (3, fingerprint([1, 2, 9]))


def test_a_commit_past_the_end_of_the_chain_keeps_all_of_the_cache() -> None:
    drafter = session([1])
    for token in (2, 3):
        draft(drafter, token)
    drafter.commit(Commit(1, (2, 3, 4)))
    assert (len(drafter.main), drafter.main.num_cached) == (0, 2)
    assert draft(drafter, 5) == [3, 4]


def test_stops_at_the_lookahead_the_end_of_the_sequence_and_of_the_context() -> None:
    for drafter, room in ((session([1], 2), 2), (session([1], 9, 4), 3), (session([1], 9, 0, 3), 2)):
        for token in range(room):
            assert wants_draft(drafter)
            draft(drafter, token)
        assert not wants_draft(drafter)
    assert not list(session([1], 0).growths())


@pytest.mark.parametrize("commit", [Commit(2, (5,)), Commit(0, (7,)), Commit(1, (50,))])
def test_gaps_contradictions_and_unknown_tokens_are_refused(commit: Commit) -> None:
    with pytest.raises(CommitMismatch):
        session([1]).commit(commit)


def test_an_overlapping_commit_is_fine() -> None:
    drafter = session([1, 2])
    drafter.commit(Commit(0, (1, 2, 3)))
    assert drafter.num_committed == 3


def test_a_pause_drops_the_chain_as_nobody_keeps_what_was_sent_of_it() -> None:
    drafter = session([1])
    for token in (2, 3, 4):
        draft(drafter, token)
    proposal_of(drafter)
    drafter.set_lookahead(0)
    assert (len(drafter.main), drafter.main.num_cached) == (0, 1)
    drafter.commit(Commit(1, (7, 8)))
    drafter.set_lookahead(2)
    assert draft(drafter, 5) == [7, 8]
    proposal = proposal_of(drafter)
    assert proposal is not None
    assert proposal.prefix_fingerprint == fingerprint([1, 7, 8])


def test_an_absurd_lookahead_is_cut() -> None:
    drafter = session([1], lookahead=2**32 - 1, max_context=10_000)
    while wants_draft(drafter):
        draft(drafter, 2)
    assert len(drafter.main) == MAX_LOOKAHEAD


# -- branches ---------------------------------------------------------------------------------------------------


def branched(lookahead: int = 6) -> tuple[DrafterSession, DraftLine]:
    """Committed 1; main line 2 3 4 5; a branch 2 33 34 35."""
    drafter = session([1], lookahead, max_branches=2)
    for token_id, runner_up in ((2, 22), (3, 33), (4, 44), (5, 55)):
        draft(drafter, token_id, runner_up)
    branch = begin_branch(drafter, 1)
    assert draft(drafter, 34, line=branch) == [33]
    assert draft(drafter, 35, line=branch) == [34]
    return drafter, branch


def test_a_branch_is_proposed_behind_what_it_shares_with_the_main_line() -> None:
    drafter, _ = branched()
    main, branch = drafter.take_proposals(4)
    assert (main.token_ids, main.is_branch) == ((2, 3, 4, 5), False)
    assert (branch.token_ids, branch.is_branch) == ((33, 34, 35), True)
    assert (branch.prefix_length, branch.prefix_fingerprint) == (2, fingerprint([1, 2]))


def test_a_miss_that_a_branch_foresaw_makes_it_the_main_line() -> None:
    drafter, branch = branched()
    drafter.take_proposals(4)
    drafter.commit(Commit(1, (2, 33)))
    assert drafter.main is branch
    assert (drafter.main.token_ids, drafter.main.num_unsent, drafter.lines[1:]) == ([34, 35], 0, [])
    assert drafter.main.num_cached == 4
    assert draft(drafter, 36) == [35]
    proposal = proposal_of(drafter)
    assert proposal is not None
    assert (proposal.prefix_fingerprint, proposal.token_ids) == (fingerprint([1, 2, 33, 34, 35]), (36,))
    assert not proposal.is_branch


def test_a_miss_elsewhere_drops_all_branches() -> None:
    drafter, _ = branched()
    drafter.commit(Commit(1, (2, 3, 9)))
    assert (len(drafter.main), drafter.lines[1:], drafter.main.num_cached) == (0, [], 3)


def test_a_branch_that_is_wrong_further_on_is_no_help() -> None:
    drafter, _ = branched()
    drafter.commit(Commit(1, (2, 33, 9)))
    assert (len(drafter.main), drafter.lines[1:], drafter.main.num_cached) == (0, [], 2)
    assert draft(drafter, 5) == [33, 9]


def test_an_agreeing_commit_keeps_the_branches_ahead_and_drops_those_behind() -> None:
    drafter, branch = branched()
    drafter.commit(Commit(1, (2,)))
    assert (drafter.lines[1:], branch.start) == ([branch], 0)
    assert drafter.sequence(branch) == [1, 2, 33, 34, 35]
    drafter.commit(Commit(2, (3,)))
    assert (drafter.lines[1:], drafter.main.token_ids) == ([], [4, 5])


def test_a_branch_waits_until_its_place_is_known_and_is_worth_a_message() -> None:
    drafter = session([1], 8, max_branches=2)
    draft(drafter, 2, 22)
    draft(drafter, 3, 33)
    branch = begin_branch(drafter, 1)
    assert [one.token_ids for one in drafter.take_proposals(4)] == [(2, 3)]
    draft(drafter, 34, line=branch)
    assert drafter.take_proposals(4) == []  # a frame for the branch alone would cost the target more than it is worth
    draft(drafter, 4)
    draft(drafter, 5)
    assert [(one.token_ids, one.is_branch) for one in drafter.take_proposals(4)] == [((4, 5), False), ((33, 34), True)]
    for token_id in range(35, 42):
        draft(drafter, token_id, line=branch)
    assert drafter.take_proposals(4) == []
    draft(drafter, 42, line=branch)
    assert [one.token_ids for one in drafter.take_proposals(4)] == [tuple(range(35, 43))]  # enough of it
    draft(drafter, 43, line=branch)
    assert [one.token_ids for one in drafter.take_proposals(1)] == [(43,)]  # nothing more is going to be drafted
    draft(drafter, 6)
    late = begin_branch(drafter, 4)  # in place of 6, which has not been sent
    draft(drafter, 66, line=late)
    assert drafter.take_proposals(4) == []


def test_branches_begin_where_a_miss_is_likely_and_within_their_number() -> None:
    drafter = session([1], 8, max_branches=1)
    for token_id, gap in ((2, 5.0), (3, 0.1), (4, 5.0)):
        draft(drafter, token_id, 40 + token_id, gap=gap)
    ways = [growth for growth in drafter.growths() if growth.line is None]
    best = max(ways, key=lambda growth: growth.reach)
    assert (best.start, best.rank) == (1, 0)
    drafter.grow(best)
    assert not [growth for growth in drafter.growths() if growth.line is None]


def test_no_branches_unless_asked_for() -> None:
    drafter = session([1], 8)
    draft(drafter, 2, 22)
    assert all(growth.is_main for growth in drafter.growths())


def test_a_branch_ends_where_the_sequence_does() -> None:
    drafter = session([1], 8, max_length=4, max_branches=4)
    draft(drafter, 2, 22)
    branch = begin_branch(drafter, 0)
    draft(drafter, 23, line=branch)
    draft(drafter, 24, line=branch)
    assert all(growth.line is not branch for growth in drafter.growths())
