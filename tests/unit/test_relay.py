"""The coordinator's session: what it sends to whom, and when it sends nothing."""

from __future__ import annotations

import pytest

from speculation.adaptive_k import Load
from speculation.draft_tree import MAX_NODES
from speculation.messages import (
    CloseSession,
    Commit,
    FinishReason,
    LogprobOptions,
    OpenDraft,
    OpenTarget,
    Proposal,
    Sampling,
    SessionError,
    SessionErrorCode,
    SessionId,
    SetK,
    SetLookahead,
    TokenLogprobs,
    Verdict,
)
from speculation.relay import Action, Emit, Fail, Finish, RelaySession, ToDraft, ToTarget, lookahead_for
from speculation.session_stats import SessionStats
from speculation.speedup import estimated_speedup

LOAD = Load(1)


class ScriptedK:
    name = "scripted"

    def __init__(self, k: int) -> None:
        self.value = k
        self.num_observed = 0

    def observe(self, verdict: Verdict, load: Load, now_s: float) -> None:
        self.num_observed += 1

    def k(self) -> int:
        return self.value


def relay(k: int | None = 4, max_lookahead: int = 99, draft_max_length: int = 0) -> tuple[RelaySession, ScriptedK]:
    policy = ScriptedK(k or 0)
    session = RelaySession(
        [1, 2], Sampling(), 50, [9], policy if k is not None else None, max_lookahead, draft_max_length
    )
    return session, policy


def verdict(
    start: int, tokens: list[int], drafted: int = 0, accepted: int = 0, end: FinishReason | None = None
) -> Verdict:
    return Verdict(start, tuple(tokens), drafted, accepted, 0, 0, end)


def open_target(k: int, tokens: tuple[int, ...] = (1, 2)) -> list[Action]:
    return [ToTarget(OpenTarget(tokens, Sampling(), 50, (9,), k))]


def test_opens_target_and_drafter_together() -> None:
    session, _ = relay()
    assert session.on_draft_up(0) == []  # nothing before the target
    assert session.on_target_up(0) == [*open_target(4), ToDraft(OpenDraft((1, 2), Sampling(), 2, 50))]


def test_without_a_drafter_or_a_policy_it_is_plain_decoding() -> None:
    for session, ups in ((relay()[0], False), (relay(None)[0], True)):
        if ups:
            assert session.on_draft_up(0) == []
        assert session.on_target_up(0) == open_target(0)
        assert session.on_target_event(verdict(2, [3]), LOAD, 0) == [Emit((3,), 0, 0, 0)]


def test_a_verdict_reaches_the_drafter_before_the_client() -> None:
    session, policy = relay()
    session.on_draft_up(0)
    session.on_target_up(0)
    assert session.on_target_event(verdict(2, [3, 4], 1, 1), LOAD, 0) == [
        ToDraft(Commit(2, (3, 4))),
        ToDraft(SetLookahead(25)),  # the first verdict: from here on a full lookahead
        Emit((3, 4), 1, 1, 4),
    ]
    assert policy.num_observed == 1


def test_at_k_zero_nothing_is_sent_to_the_drafter_and_what_it_missed_comes_later() -> None:
    session, policy = relay()
    session.on_draft_up(0)
    session.on_target_up(0)
    policy.value = 0
    assert session.on_target_event(verdict(2, [3]), LOAD, 0) == [
        ToDraft(SetLookahead(0)),
        Emit((3,), 0, 0, 4),
        ToTarget(SetK(0)),
    ]
    assert session.on_target_event(verdict(3, [4]), LOAD, 0) == [Emit((4,), 0, 0, 0)]
    policy.value = 2
    assert session.on_target_event(verdict(4, [5]), LOAD, 0) == [
        ToDraft(Commit(2, (3, 4, 5))),
        ToDraft(SetLookahead(15)),
        Emit((5,), 0, 0, 0),
        ToTarget(SetK(2)),
    ]


def test_a_useless_drafter_is_not_even_opened() -> None:
    session, _ = relay(k=0)
    session.on_draft_up(0)
    assert session.on_target_up(0) == open_target(0)


def test_a_lost_drafter_means_plain_decoding_and_one_open_brings_it_back() -> None:
    session, _ = relay()
    session.on_target_up(0)
    assert session.on_draft_up(0) == [ToDraft(OpenDraft((1, 2), Sampling(), 2, 50)), ToTarget(SetK(4))]
    assert session.on_draft_lost(0) == [ToTarget(SetK(0))]
    assert session.on_target_event(verdict(2, [3]), LOAD, 0) == [Emit((3,), 0, 0, 0)]
    assert session.on_draft_up(0) == [ToDraft(OpenDraft((1, 2, 3), Sampling(), 25, 50)), ToTarget(SetK(4))]
    assert session.stats.num_draft_losses == 1


def test_a_lost_target_is_replaced_by_replaying_what_is_committed() -> None:
    session, _ = relay()
    session.on_draft_up(0)
    session.on_target_up(0)
    session.on_target_event(verdict(2, [3]), LOAD, 0)
    assert session.on_target_lost(0) == [ToDraft(CloseSession())]  # what it has sent is lost with the target
    assert session.on_target_event(verdict(2, [8]), LOAD, 0) == []  # of the lost one
    assert session.on_target_up(0) == [
        *open_target(4, (1, 2, 3)),
        ToDraft(OpenDraft((1, 2, 3), Sampling(), 25, 50)),
    ]
    assert session.stats.num_target_losses == 1


def test_proposals_are_relayed_late_ones_too_but_not_to_a_target_that_wants_none() -> None:
    session, policy = relay()
    session.on_draft_up(0)
    session.on_target_up(0)
    proposal = Proposal(2, 77, (3, 4), (1.0, 1.0))
    assert session.on_draft_event(proposal, 0) == [ToTarget(proposal)]
    session.on_target_event(verdict(2, [3, 4]), LOAD, 0)
    assert session.on_draft_event(proposal, 0) == [ToTarget(proposal)]
    policy.value = 0
    session.on_target_event(verdict(4, [5]), LOAD, 0)
    assert session.on_draft_event(proposal, 0) == []
    assert (session.stats.num_proposed, session.stats.num_dropped) == (6, 2)


def test_a_flood_of_proposals_is_dropped_and_counted_until_the_next_verdict() -> None:
    session, _ = relay()
    session.on_draft_up(0)
    session.on_target_up(0)
    proposal = Proposal(2, 77, (3,) * 200, ())
    relayed = [session.on_draft_event(proposal, 0) for _ in range(50)]
    num_relayed = relayed.count([ToTarget(proposal)])
    assert 0 < num_relayed * 200 <= MAX_NODES
    assert relayed == [[ToTarget(proposal)]] * num_relayed + [[]] * (50 - num_relayed)
    assert (session.stats.num_proposed, session.stats.num_dropped) == (10_000, 10_000 - 200 * num_relayed)
    session.on_target_event(verdict(2, [3]), LOAD, 0)
    assert session.on_draft_event(proposal, 0) == [ToTarget(proposal)]


def test_a_session_error_of_the_drafter_costs_speculation_only() -> None:
    session, _ = relay()
    session.on_draft_up(0)
    session.on_target_up(0)
    error = SessionError(SessionErrorCode.OUT_OF_MEMORY, "full")
    assert session.on_draft_event(error, 0) == [ToTarget(SetK(0))]


def test_a_session_error_of_the_target_is_the_end() -> None:
    session, _ = relay()
    session.on_draft_up(0)
    session.on_target_up(0)
    error = SessionError(SessionErrorCode.INTERNAL, "broken")
    assert session.on_target_event(error, LOAD, 0) == [Fail(error), ToDraft(CloseSession())]
    assert session.is_over


def test_the_end_closes_the_drafter_only() -> None:
    session, _ = relay()
    session.on_draft_up(0)
    session.on_target_up(0)
    assert session.on_target_event(verdict(2, [9], end=FinishReason.STOP), LOAD, 0) == [
        Emit((9,), 0, 0, 4),
        Finish(FinishReason.STOP),
        ToDraft(CloseSession()),
    ]
    assert session.cancel(0) == []


def test_cancel_closes_both() -> None:
    session, _ = relay()
    session.on_draft_up(0)
    session.on_target_up(0)
    assert session.cancel(0) == [ToDraft(CloseSession()), ToTarget(CloseSession())]
    assert session.on_target_event(verdict(2, [3]), LOAD, 0) == []


def test_drafting_stops_where_the_draft_models_context_ends() -> None:
    session, _ = relay(draft_max_length=4)
    session.on_draft_up(0)
    session.on_target_up(0)
    actions = session.on_target_event(verdict(2, [3]), LOAD, 0)
    assert actions == [ToDraft(SetLookahead(0)), Emit((3,), 0, 0, 4), ToTarget(SetK(0))]


def test_statistics_never_count_the_targets_own_token_as_accepted() -> None:
    session, _ = relay()
    session.on_draft_up(0)
    session.on_target_up(0)
    session.on_target_event(verdict(2, [3, 4, 5], 4, 2), LOAD, 0)
    session.on_target_event(verdict(5, [6]), LOAD, 0)
    stats = session.stats
    assert (stats.num_steps, stats.num_free_run_steps, stats.num_committed) == (2, 1, 4)
    assert (stats.acceptance_rate, stats.mean_acceptance_length, stats.mean_k) == (0.5, 2.0, 4.0)


def test_lookahead_covers_a_step_its_own_token_and_the_next_step() -> None:
    assert [lookahead_for(k, 32) for k in (0, 1, 4, 8)] == [0, 10, 25, 32]


def test_a_prompt_is_told_and_shared_once() -> None:
    session = RelaySession(
        [1, 2], Sampling(), 50, [9], None, 0, logprobs=LogprobOptions(3), prompt_logprobs=2, fork_of=SessionId(7)
    )
    [first] = session.on_target_up(0)
    said = TokenLogprobs(-0.5)
    assert first == ToTarget(
        OpenTarget((1, 2), Sampling(), 50, (9,), 0, False, LogprobOptions(3), 2, fork_of=SessionId(7))
    )
    session.on_target_lost(0)
    assert session.on_target_up(0) == [first]  # nothing of the prompt has been told yet
    verdict = Verdict(2, (3,), 0, 0, 0, logprobs=(said,), prompt_logprobs=(said,))
    assert session.on_target_event(verdict, LOAD, 0) == [Emit((3,), 0, 0, 0, (said,), (said,))]
    session.on_target_lost(0)
    assert session.on_target_up(0) == [
        ToTarget(OpenTarget((1, 2, 3), Sampling(), 50, (9,), 0, False, LogprobOptions(3)))
    ]


def test_stats_tell_how_many_were_accepted_and_wasted() -> None:
    stats = SessionStats(num_proposed=9)
    for num_drafted, num_accepted in ((4, 4), (4, 1), (2, 1), (0, 0)):
        stats.count(Verdict(0, (1,) * (num_accepted + 1), num_drafted, num_accepted, 0), 4)
    assert (dict(stats.steps_by_accepted), stats.num_wasted) == ({4: 1, 1: 2}, 3)


def test_the_speedup_is_told_in_plain_steps() -> None:
    assert estimated_speedup(101, 0.2, 0.004) == pytest.approx(2.0)
    assert estimated_speedup(1, 0.2, 0.004) == estimated_speedup(9, 0.2, None) == estimated_speedup(9, 0, 0.1) == 0
