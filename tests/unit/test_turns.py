"""Taking turns: who sits out, for how long, and what coordinator and target agree on."""

from __future__ import annotations

from speculation.adaptive_k import FixedK, Load
from speculation.cost import StepCostModel
from speculation.experience import Experience
from speculation.fingerprint import fingerprint
from speculation.messages import OpenDraft, OpenTarget, Proposal, Sampling, SessionId, SetK, SetLookahead, Verdict
from speculation.planner import Candidate, StepPlan, StepPlanner
from speculation.relay import RelaySession, ToDraft, ToTarget
from speculation.turns import TURN_TIMEOUT_S, Turn
from speculation.verifier import VerifierSession

NOW_S = 100.0


def candidate(session: int, num_staged: int, turn: Turn | None) -> Candidate:
    return Candidate(SessionId(session), num_staged, 4, (0.9, 0.8, 0.7, 0.6), None, turn)


def plan(*candidates: Candidate, num_prefill_tokens: int = 0) -> StepPlan:
    return StepPlanner(StepCostModel(), 100).plan(candidates, NOW_S, 0.0, num_prefill_tokens)


def test_waits_for_the_whole_turn_and_no_longer() -> None:
    turn = Turn(4, NOW_S - 0.5)
    assert plan(candidate(1, 3, turn)) == StepPlan(TURN_TIMEOUT_S - 0.5, {})
    assert plan(candidate(1, 4, turn)) == StepPlan(0.0, {SessionId(1): 4})


def test_a_drafter_that_is_late_beyond_measure_holds_nobody_up() -> None:
    assert plan(candidate(1, 2, Turn(4, NOW_S - TURN_TIMEOUT_S))) == StepPlan(0.0, {SessionId(1): 2})


def test_those_that_take_turns_go_together_and_the_others_without_them() -> None:
    turn = Turn(4, NOW_S)
    ready, not_ready, streaming = candidate(1, 4, turn), candidate(2, 0, turn), candidate(3, 1, None)
    assert plan(ready, not_ready) == StepPlan(TURN_TIMEOUT_S, {})
    assert plan(ready, not_ready, streaming) == StepPlan(0.0, {SessionId(3): 1})
    assert plan(ready, candidate(2, 4, turn)) == StepPlan(0.0, {SessionId(1): 4, SessionId(2): 4})


def test_nobody_sits_out_a_step_that_is_run_for_a_prompt() -> None:
    assert plan(candidate(1, 1, Turn(4, NOW_S)), num_prefill_tokens=5) == StepPlan(0.0, {SessionId(1): 1})


def verifier(max_length: int = 50, k: int = 4, turns: bool = True) -> VerifierSession:
    command = OpenTarget((1, 2), Sampling(), max_length, (), k, turns)
    return VerifierSession(command, 50, Experience(lookups=None))


def test_the_first_token_never_waits_and_the_end_of_the_sequence_needs_fewer_drafts() -> None:
    target = verifier(max_length=6)
    assert target.turn is None
    target.conclude([], [3], NOW_S)
    assert target.turn == Turn(2, NOW_S)  # room for 3 more, of which the last is the target's own
    target.set_k(0)
    assert target.turn == Turn(0, NOW_S)
    assert plan(candidate(1, 0, target.turn)).wait_s == 0.0


def test_a_session_that_streams_has_no_turn() -> None:
    target = verifier(turns=False)
    target.conclude([], [3], NOW_S)
    assert target.turn is None


def test_the_coordinator_asks_for_no_more_drafts_than_one_turn_needs() -> None:
    relay = RelaySession([1, 2], Sampling(), 50, [], FixedK(4), 20, turns=True, max_branches=8)
    assert relay.on_draft_up(0) == []
    opened = relay.on_target_up(0)
    assert opened[0] == ToTarget(OpenTarget((1, 2), Sampling(), 50, (), 4, turns=True))
    assert isinstance(opened[1], ToDraft)
    assert isinstance(opened[1].command, OpenDraft)
    assert opened[1].command.max_branches == 0  # else the drafter leaves what is unlikely, and the target waits for it
    assert ToDraft(SetLookahead(4)) in relay.on_target_event(Verdict(2, (3,), 0, 0, 0), Load(1), 0)


def test_the_target_never_waits_for_drafts_that_cannot_come() -> None:
    short_lookahead = RelaySession([1, 2], Sampling(), 50, [], FixedK(4), 3, turns=True)
    short_lookahead.on_draft_up(0)
    assert short_lookahead.on_target_up(0)[0] == ToTarget(OpenTarget((1, 2), Sampling(), 50, (), 3, turns=True))

    short_context = RelaySession([1, 2], Sampling(), 50, [], FixedK(4), 20, draft_max_length=6, turns=True)
    short_context.on_draft_up(0)
    short_context.on_target_up(0)
    assert ToTarget(SetK(3)) in short_context.on_target_event(Verdict(2, (3,), 0, 0, 0), Load(1), 0)
    assert ToTarget(SetK(0)) in short_context.on_draft_lost(0)


def test_a_turn_ends_with_the_last_draft_that_it_needs() -> None:
    target = verifier()
    target.conclude([], [3], NOW_S)
    prefix = (1, 2, 3)
    for staged, waits in ((3, True), (1, False)):
        at = len(prefix)
        target.stage(Proposal(at, fingerprint(prefix), tuple(range(10, 10 + staged)), (1.0,) * staged), NOW_S)
        prefix += tuple(range(10, 10 + staged))
        assert target.turn is not None
        assert (target.turn.wait_s(target.num_staged, NOW_S) > 0) == waits
