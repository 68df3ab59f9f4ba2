"""One step of one session at the target: what is committed, counted and kept."""

import pytest

from speculation.acceptance import AcceptanceProfile
from speculation.draft_distribution import DraftDistribution, one_hot
from speculation.experience import Experience
from speculation.fingerprint import fingerprint
from speculation.messages import FinishReason, Method, OpenTarget, Proposal, Sampling
from speculation.prompt_lookup import LookupStatistics
from speculation.verifier import MAX_K, VerifierSession

STOP = 9
GREEDY = Sampling()


def session(
    prompt: list[int],
    max_length: int = 100,
    k: int = 8,
    lookups: LookupStatistics | None = None,
    sampling: Sampling = GREEDY,
    turns: bool = False,
    max_lookup: int = 5,
) -> VerifierSession:
    command = OpenTarget(tuple(prompt), sampling, max_length, (STOP,), k, turns=turns, max_lookup=max_lookup)
    return VerifierSession(command, 50, Experience(lookups=lookups))


def stage(session: VerifierSession, chain: list[int]) -> None:
    prefix = list(session.token_ids)
    session.stage(Proposal(len(prefix), fingerprint(prefix), tuple(chain), (1.0,) * len(chain)), 0.0)


def test_all_accepted_adds_the_bonus_token() -> None:
    target = session([1])
    stage(target, [2, 3])
    verdict = target.conclude([2, 3], [2, 3, 4], 0.0)
    assert (verdict.start, verdict.token_ids, verdict.num_drafted, verdict.num_accepted) == (1, (2, 3, 4), 2, 2)
    assert list(target.token_ids) == [1, 2, 3, 4]


def test_a_miss_commits_the_targets_own_token_and_counts_it_as_no_acceptance() -> None:
    target = session([1])
    stage(target, [2, 7, 8])
    verdict = target.conclude([2, 7, 8], [2, 3, 5, 6], 0.0)
    assert (verdict.token_ids, verdict.num_accepted, verdict.num_staged) == ((2, 3), 1, 0)


def test_the_draws_behind_a_miss_are_never_looked_at() -> None:
    target = session([1])
    verdict = target.conclude([5, 6], [4, 6, STOP], 0.0)
    assert (verdict.token_ids, verdict.finish_reason) == ((4,), None)


def test_nothing_follows_an_accepted_stop_token() -> None:
    target = session([1])
    verdict = target.conclude([2, STOP, 3], [2, STOP, 3, 4], 0.0)
    assert (verdict.token_ids, verdict.num_accepted, verdict.finish_reason) == ((2, STOP), 2, FinishReason.STOP)


def test_a_stop_token_of_the_targets_own() -> None:
    verdict = session([1]).conclude([2], [STOP, 3], 0.0)
    assert (verdict.token_ids, verdict.num_accepted, verdict.finish_reason) == ((STOP,), 0, FinishReason.STOP)


def test_a_stop_token_in_the_prompt_does_not_stop() -> None:
    assert session([1, STOP]).conclude([], [3], 0.0).finish_reason is None


@pytest.mark.parametrize("num_staged", [0, 1, 2, 5])
def test_the_length_limit_leaves_room_for_the_targets_own_token(num_staged: int) -> None:
    target = session([1], max_length=4)
    stage(target, [2, 3, 4, 5, 6][:num_staged] or [7])
    drafted = target.drafted(num_staged)
    assert len(drafted) == min(num_staged, 2)
    verdict = target.conclude(drafted, [2, 3, 4][: len(drafted) + 1], 0.0)
    assert len(target.token_ids) <= 4
    assert (verdict.finish_reason is FinishReason.LENGTH) == (len(target.token_ids) == 4)


def test_a_stop_token_at_the_limit_is_a_stop() -> None:
    assert session([1], max_length=2).conclude([], [STOP], 0.0).finish_reason is FinishReason.STOP


def test_malformed_proposals_are_dropped_and_counted() -> None:
    target = session([1])
    prefix = fingerprint([1])
    target.stage(Proposal(1, prefix, (50,), (1.0,)), 0.0)  # outside the vocabulary
    target.stage(Proposal(1, prefix, (), ()), 0.0)
    target.stage(Proposal(1, prefix, (2,) * 300, (1.0,) * 300), 0.0)
    target.stage(Proposal(7, prefix, (2,), (1.0,)), 0.0)
    assert target.drafted(9) == []
    assert target.conclude([], [2], 0.0).num_dropped == 302
    assert target.conclude([], [2], 0.0).num_dropped == 0


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.0, method=Method.REJECTION, draft_top_n=8)])
@pytest.mark.parametrize("num_distributions", [1, 2, 40])
def test_what_tokens_were_drawn_from_is_nothing_to_a_session_that_does_not_ask(
    sampling: Sampling, num_distributions: int
) -> None:
    """However many there are; a chain longer than them ended the whole worker."""
    target = VerifierSession(OpenTarget((1,), sampling, 100, (STOP,), 8), 50, Experience(lookups=None))
    q = (DraftDistribution((99,), (1,)),) * num_distributions
    target.stage(Proposal(1, fingerprint([1]), (2, 3, 4), (1.0,), distributions=q), 0.0)
    assert target.drafted(8) == [2, 3, 4]
    assert target.staged_behind([]) == [(2, one_hot(2))]


def test_late_drafts_are_evidence_though_they_were_never_verified() -> None:
    target = session([1])
    before = fingerprint([1])
    target.conclude([], [2], 0.0)
    target.stage(Proposal(1, before, (2, 3), (1.0, 1.0)), 0.0)  # 2 came too late, and was right; 3 is staged
    verdict = target.conclude([], [4], 0.0)  # the step did not take 3, which was wrong
    assert (verdict.num_drafted, verdict.num_late, verdict.num_late_right) == (0, 2, 1)
    target.stage(Proposal(1, before, (8, 9), (1.0, 1.0)), 0.0)
    verdict = target.conclude([], [5], 0.0)
    assert (verdict.num_late, verdict.num_late_right, verdict.num_dropped) == (1, 0, 2)
    assert target.conclude([], [5], 0.0).num_late == 0
    assert target.profile.survival(1)[0] < AcceptanceProfile().survival(1)[0]


def test_the_targets_own_token_is_compared_with_the_next_staged_one() -> None:
    target = session([1])
    stage(target, [2, 3, 4])
    verdict = target.conclude([2], [2, 3], 0.0)
    assert (verdict.num_drafted, verdict.num_accepted, verdict.num_late, verdict.num_late_right) == (1, 1, 1, 1)
    assert verdict.num_staged == 1


def test_an_absurd_k_is_cut() -> None:
    assert session([1], k=2**32 - 1).k == MAX_K


# -- tokens looked up in the sequence -----------------------------------------------------------------------------

REPEATING = [1, 2, 3, 4, 5, 1, 2]


def test_what_followed_before_fills_the_step_behind_the_staged_tokens() -> None:
    target = session(REPEATING, k=5, lookups=LookupStatistics())
    assert target.drafted(5) == [3, 4, 5, 1, 2]
    stage(target, [7, 1])
    assert target.drafted(5) == [7, 1, 2, 7, 1]
    assert target.drafted(2) == [7, 1]
    assert target.num_staged == 2
    assert len(target.lookup_chances) == 3


def test_accepted_lookups_are_committed_and_counted_apart() -> None:
    target = session(REPEATING, k=5, lookups=LookupStatistics())
    stage(target, [3])
    verdict = target.conclude([3, 4, 5, 1, 2], [3, 4, 5, 8, 2, 3], 0.0)
    assert (verdict.token_ids, verdict.num_drafted, verdict.num_accepted) == ((3, 4, 5, 8), 1, 1)
    assert (verdict.num_looked_up, verdict.num_looked_up_accepted) == (4, 2)
    assert not verdict.missed, "the drafter was right; what was looked up is not its affair"
    assert (verdict.num_late, verdict.num_late_right) == (0, 0)


def test_behind_a_wrong_draft_no_lookup_counts() -> None:
    target = session(REPEATING, k=5, lookups=LookupStatistics())
    stage(target, [7])
    drafted = target.drafted(5)
    verdict = target.conclude(drafted, [3, *drafted[1:], 6], 0.0)
    assert (verdict.token_ids, verdict.num_accepted, verdict.num_looked_up_accepted, verdict.missed) == (
        (3,),
        0,
        0,
        True,
    )


def test_a_stop_token_among_the_lookups_ends_the_session() -> None:
    target = session([1, 2, STOP, 4, 1, 2], k=4, lookups=LookupStatistics())
    assert target.drafted(4) == [STOP, 4, 1, 2]
    verdict = target.conclude([STOP, 4, 1, 2], [STOP, 4, 1, 2, 5], 0.0)
    assert (verdict.token_ids, verdict.finish_reason, verdict.num_looked_up_accepted) == ((STOP,), FinishReason.STOP, 1)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_lookups_leave_room_for_the_targets_own_token(room: int) -> None:
    target = session(REPEATING, max_length=len(REPEATING) + room, k=8, lookups=LookupStatistics())
    assert target.drafted(8) == [3, 4, 5][: room - 1]


def test_the_same_tokens_are_found_anew_after_each_change() -> None:
    target = session(REPEATING, k=3, lookups=LookupStatistics())
    assert target.drafted(3) == [3, 4, 5]
    target.conclude([], [4], 0.0)
    assert target.drafted(3) == [5, 1, 2]
    stage(target, [8, 9])
    assert target.drafted(4) == [8, 9]


def test_k_bounds_the_drafters_tokens_alone() -> None:
    """A drafter that is no good says nothing of the text: what it sent beyond K is passed over, and still judged."""
    target = session(REPEATING, k=1, lookups=LookupStatistics())
    stage(target, [3, 4, 8])
    drafted = target.drafted(9)
    assert drafted == [3, 4, 5, 1, 2]
    verdict = target.conclude(drafted, [3, 4, 5, 1, 2, 3], 0.0)
    assert (verdict.num_drafted, verdict.num_accepted) == (1, 1)
    assert (verdict.num_looked_up, verdict.num_looked_up_accepted) == (4, 4)
    assert (verdict.num_late, verdict.num_late_right, verdict.missed) == (2, 1, True)
    target.set_k(0)
    assert target.drafted(3) == [4, 5, 1]


@pytest.mark.parametrize("name", ["none", "turns", "ratio", "not asked for"])
def test_nothing_is_looked_up(name: str) -> None:
    """Turns wait for the drafter's tokens; a ratio needs to know what a token was drawn from."""
    target = session(
        REPEATING,
        k=4,
        max_lookup=0 if name == "not asked for" else 4,
        lookups=None if name == "none" else LookupStatistics(),
        sampling=Sampling(1.0, method=Method.REJECTION) if name == "ratio" else GREEDY,
        turns=name == "turns",
    )
    assert target.drafted(target.k) == []
    assert target.lookup_chances == ()


def test_lookups_are_learned_of_though_no_step_took_them() -> None:
    lookups = LookupStatistics()
    before = session(REPEATING, k=4, lookups=lookups).lookup_chances
    for _ in range(20):
        target = session(REPEATING, k=4, lookups=lookups)
        assert target.drafted(1) == [3]
        target.conclude([], [8], 0.0)
    assert session(REPEATING, k=4, lookups=lookups).lookup_chances[0] < 0.2 < before[0]
