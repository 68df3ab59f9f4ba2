"""What the draft worker feeds its model and proposes, as commits come in."""

import pytest

from speculation.drafter import MAX_LOOKAHEAD, CommitMismatch, DrafterSession
from speculation.fingerprint import fingerprint
from speculation.messages import Commit, OpenDraft, Sampling


def session(prompt: list[int], lookahead: int = 4, max_length: int = 0, max_context: int = 100) -> DrafterSession:
    return DrafterSession(OpenDraft(tuple(prompt), Sampling(), lookahead, max_length), 50, max_context)


def draft(drafter: DrafterSession, token_id: int) -> list[int]:
    """One step of the model: returns what it was fed."""
    fed = drafter.uncached()
    drafter.num_cached += len(fed)
    drafter.drafted(token_id, 0.5)
    return fed


def test_feeds_the_prompt_once_and_then_its_own_drafts() -> None:
    drafter = session([1, 2])
    assert [draft(drafter, 3), draft(drafter, 4), draft(drafter, 5)] == [[1, 2], [3], [4]]
    proposal = drafter.take_proposal()
    assert proposal is not None
    assert (proposal.prefix_length, proposal.prefix_fingerprint) == (2, fingerprint([1, 2]))
    assert (proposal.token_ids, proposal.confidences) == ((3, 4, 5), (0.5, 0.5, 0.5))
    assert drafter.take_proposal() is None


def test_what_is_drafted_later_goes_out_addressed_by_all_that_precedes_it() -> None:
    drafter = session([1])
    draft(drafter, 2)
    drafter.take_proposal()
    draft(drafter, 3)
    drafter.commit(Commit(1, (2,)))
    proposal = drafter.take_proposal()
    assert proposal is not None
    assert (proposal.prefix_length, proposal.prefix_fingerprint, proposal.token_ids) == (2, fingerprint([1, 2]), (3,))


def test_an_agreeing_commit_keeps_chain_and_cache() -> None:
    drafter = session([1])
    for token in (2, 3, 4):
        draft(drafter, token)
    drafter.commit(Commit(1, (2, 3)))
    assert (drafter.num_drafted, drafter.num_cached) == (1, 3)
    assert draft(drafter, 5) == [4]


def test_a_miss_drops_the_chain_at_once_and_keeps_only_the_agreeing_cache() -> None:
    drafter = session([1])
    for token in (2, 3, 4):
        draft(drafter, token)
    drafter.commit(Commit(1, (2, 9)))
    assert (drafter.num_drafted, drafter.num_unsent, drafter.num_cached) == (0, 0, 2)
    assert draft(drafter, 5) == [9]
    proposal = drafter.take_proposal()
    assert proposal is not None
    assert (proposal.prefix_length, proposal.prefix_fingerprint) == (3, fingerprint([1, 2, 9]))


def test_a_commit_past_the_end_of_the_chain_keeps_all_of_the_cache() -> None:
    drafter = session([1])
    for token in (2, 3):
        draft(drafter, token)
    drafter.commit(Commit(1, (2, 3, 4)))
    assert (drafter.num_drafted, drafter.num_cached) == (0, 2)
    assert draft(drafter, 5) == [3, 4]


def test_stops_at_the_lookahead_the_end_of_the_sequence_and_of_the_context() -> None:
    for drafter, room in ((session([1], 2), 2), (session([1], 9, 4), 3), (session([1], 9, 0, 3), 2)):
        for token in range(room):
            assert drafter.wants_draft()
            draft(drafter, token)
        assert not drafter.wants_draft()
    assert not session([1], 0).wants_draft()


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
    drafter.take_proposal()
    drafter.set_lookahead(0)
    assert (drafter.num_drafted, drafter.num_cached) == (0, 1)
    drafter.commit(Commit(1, (7, 8)))
    drafter.set_lookahead(2)
    assert draft(drafter, 5) == [7, 8]
    proposal = drafter.take_proposal()
    assert proposal is not None
    assert proposal.prefix_fingerprint == fingerprint([1, 7, 8])


def test_an_absurd_lookahead_is_cut() -> None:
    drafter = session([1], lookahead=2**32 - 1, max_context=10_000)
    while drafter.wants_draft():
        draft(drafter, 2)
    assert drafter.num_drafted == MAX_LOOKAHEAD
