"""One frame for each step of a target, in time for its end; what has missed one does not miss the next."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.cost import StepCostModel
from speculation.gathering import MAX_GATHER_S
from speculation.messages import (
    CloseSession,
    Commit,
    OpenTarget,
    Proposal,
    Sampling,
    SessionId,
    SetK,
    StepReport,
    TargetCommand,
    TargetFrame,
)
from speculation.outbox import MAX_CREDIT, OVER, Outbox

ONE = SessionId(1)
STEP_S = 0.010
GATHER_S = 0.008


def outbox(costs: StepCostModel | None = None) -> Outbox[TargetCommand]:
    return Outbox(costs)


def frame(gather_s: float = GATHER_S, num_heard: int = 0, num_tokens: int = 4) -> TargetFrame:
    return TargetFrame((), StepReport(STEP_S, 1, num_tokens), gather_s, num_heard)


def busy(now_s: float = 1.0) -> Outbox[TargetCommand]:
    """Of a target that has just begun a step."""
    found = outbox()
    found.on_frame(frame(), now_s - STEP_S)
    found.on_frame(frame(), now_s)
    return found


def opening(num_tokens: int) -> OpenTarget:
    return OpenTarget((1,) * num_tokens, Sampling(), 1000, (), 0)


def due_in(box: Outbox[TargetCommand], now_s: float) -> float:
    return max(0.0, box.due_s(now_s) - now_s)


def test_an_idle_target_and_a_draft_worker_are_told_at_once() -> None:
    box = outbox()
    box.put(ONE, SetK(2), 1.0)
    assert due_in(box, 1.0) == 0.0
    assert box.take(1.0) == [(ONE, SetK(2))]
    assert box.is_empty
    box.on_frame(frame(gather_s=0.0), 2.0)
    assert due_in(box, 2.001) == box.wanted_in_s(2.001) == 0.0


def test_what_is_said_during_a_step_leaves_together_in_time_for_its_end() -> None:
    box = busy()
    box.put(ONE, SetK(2), 1.001)
    box.put(ONE, CloseSession(), 1.001)
    assert due_in(box, 1.001) == pytest.approx(0.007)
    assert box.wanted_in_s(1.001) == pytest.approx(0.007)
    assert box.take(1.008) == [(ONE, SetK(2)), (ONE, CloseSession())]


def test_drafts_that_should_come_at_once_gather_here_all_the_same() -> None:
    box = busy()
    box.on_frame(replace(frame(), drafts_at_once=True), 2.0)
    assert box.wanted_in_s(2.0) == 0.0  # what drafters are told
    box.put(ONE, drafts(10), 2.001)
    assert due_in(box, 2.001) == pytest.approx(0.007)
    box.on_frame(frame(), 3.0)
    assert box.wanted_in_s(3.0) == pytest.approx(GATHER_S)


def test_what_comes_too_late_leaves_in_time_for_the_step_after_it() -> None:
    box = busy()
    box.put(ONE, SetK(2), 1.001)
    box.take(1.008)
    box.put(ONE, SetK(3), 1.009)
    assert due_in(box, 1.009) > STEP_S / 2
    box.take(1.018)
    assert box.is_empty


def test_what_has_missed_its_step_leaves_at_once_and_others_have_the_time_of_the_next() -> None:
    """Else a target whose steps get shorter would never hear of anything again."""
    box = busy()
    box.put(ONE, SetK(2), 1.001)
    box.on_frame(frame(), 1.005)
    assert due_in(box, 1.005) == 0.0
    assert box.wanted_in_s(1.005) == pytest.approx(GATHER_S)
    assert box.take(1.005) == [(ONE, SetK(2))]
    assert box.due_s(1.006) == pytest.approx(1.005 + GATHER_S)


def test_what_comes_after_the_steps_frame_has_left_waits_for_the_next_steps() -> None:
    box = busy()
    box.put(ONE, SetK(2), 1.001)
    box.take(1.008)
    box.put(ONE, SetK(3), 1.009)
    box.on_frame(frame(), 1.010)
    assert box.due_s(1.010) == pytest.approx(1.010 + GATHER_S)
    box.on_frame(frame(), 1.015)  # a shorter step: it has missed this one, and should not miss another
    assert due_in(box, 1.015) == 0.0


def test_steps_that_get_shorter_one_after_the_other_hold_nothing_back_twice() -> None:
    box = busy()
    for now_s in (1.005, 1.009, 1.012):  # each over before what gathers for it is due
        box.put(ONE, SetK(2), now_s - 0.001)
        box.on_frame(frame(), now_s)
        assert due_in(box, now_s) == 0.0
        box.take(now_s)


TWO = SessionId(2)


def drafts(num_committed: int) -> Proposal:
    return Proposal(num_committed, 0, (1, 2), (1.0, 1.0), num_committed=num_committed)


def test_drafts_that_were_told_to_gather_leave_when_all_are_here() -> None:
    box = busy()
    for session_id in (ONE, TWO):
        box.on_told_drafter(session_id, Commit(10, (1, 2), gather_s=0.004))
    box.put(ONE, drafts(10), 1.003)  # left before the drafter heard of it
    box.put(ONE, drafts(12), 1.003)
    assert due_in(box, 1.004) == pytest.approx(0.004)
    box.put(TWO, drafts(12), 1.004)
    assert due_in(box, 1.004) == 0.0
    assert len(box.take(1.004)) == 3
    box.put(ONE, drafts(12), 1.005)  # the step has had its frame
    assert due_in(box, 1.005) > STEP_S / 2


def test_complete_drafts_leave_at_once_in_each_of_many_steps() -> None:
    """Not only where other steps had no frame: the drafter has held them until the last moment already."""
    box = busy()
    for at_s in (1.004, 1.008):  # a step that has had two frames
        box.put(ONE, SetK(2), at_s)
        box.take(at_s)
    for step in range(1, 6):
        start_s = 1.0 + step * STEP_S
        box.on_frame(frame(), start_s)
        box.on_told_drafter(ONE, Commit(9 + step, (1,), gather_s=0.004))
        box.put(ONE, drafts(10 + step), start_s + 0.004)
        assert due_in(box, start_s + 0.004) == 0.0
        assert box.take(start_s + 0.004) == [(ONE, drafts(10 + step))]


@given(st.lists(st.lists(st.sampled_from(["drafts", "other", "told"]), max_size=10), min_size=10, max_size=50))
def test_no_more_frames_leave_than_steps_begin(steps: list[list[str]]) -> None:
    """Whatever is said, awaited or complete, in steps of a fifth to twice the usual time."""
    box, now_s, num_frames = busy(), 1.0, 0
    for events in steps:
        for event in [*events, "step"]:
            now_s += STEP_S / 5
            if event == "step":
                box.on_frame(frame(), now_s)
            elif event == "told":
                box.on_told_drafter(ONE, Commit(10, (1, 2), gather_s=0.004))
            else:
                box.put(ONE, drafts(12) if event == "drafts" else SetK(2), now_s)
            if not box.is_empty and due_in(box, now_s) == 0.0:
                box.take(now_s)
                num_frames += 1
    assert num_frames <= len(steps) + MAX_CREDIT


def test_where_no_frame_comes_any_more_nothing_is_held_for_ever() -> None:
    """A target sends none for a step that only prefills."""
    box = busy()
    for at_s in (1.008, 1.009):
        box.put(ONE, SetK(2), at_s)
        box.take(at_s)
    box.put(ONE, SetK(3), 1.009)
    assert box.due_s(1.009) == pytest.approx(1.0 + OVER * STEP_S)
    box.take(1.0 + OVER * STEP_S)
    box.put(ONE, SetK(4), 1.5)
    assert due_in(box, 1.5) == 0.0


@pytest.mark.parametrize("gather_s", [0.0001, 0.001, 0.005, 0.009])
def test_a_step_has_one_frame_however_long_frames_take(gather_s: float) -> None:
    """Where that is nearly a whole step there is next to no time to gather, and no reason to send more."""
    box, num_frames = outbox(), 0
    for step in range(100):
        start_s = 1.0 + step * STEP_S
        box.on_frame(frame(gather_s), start_s)
        for index in range(20):
            now_s = start_s + index * STEP_S / 20
            box.put(ONE, SetK(2), now_s)
            if due_in(box, now_s) == 0.0:
                box.take(now_s)
                num_frames += 1
    assert 90 <= num_frames <= 100 + MAX_CREDIT


@pytest.mark.parametrize("command", [CloseSession(), OpenTarget((1,), Sampling(), 1000, (), 0)])
def test_who_begins_or_ends_is_worth_a_second_frame(command: TargetCommand) -> None:
    box = busy()
    for at_s in (1.002, 1.004, 1.009):  # before the step's frame was due, and after
        box.put(ONE, SetK(2), at_s)
        box.take(at_s)
        box.put(ONE, drafts(10), at_s)
        assert box.due_s(at_s) > 1.0 + STEP_S
        box.put(ONE, command, at_s)
        assert due_in(box, at_s) == pytest.approx(max(0.0, 1.008 - at_s))
        assert box.take(max(at_s, 1.008)) == [(ONE, drafts(10)), (ONE, command)]


@given(
    st.lists(st.tuples(st.floats(0.0, 2.0), st.sampled_from(["frame", "stepless", "drafts", "told"])), max_size=60),
    st.sampled_from([1e-9, 0.01, 0.9, 1.0, math.inf, math.nan]),
)
def test_nothing_is_held_for_more_than_a_second(events: list[tuple[float, str]], gather_s: float) -> None:
    """Whatever a target says and leaves unsaid."""
    box, now_s, said_s = busy(0.0), 0.0, None
    for after_s, event in [*events, (0.0, "drafts")]:
        now_s += after_s
        if said_s is not None and box.due_s(now_s) <= now_s:
            box.take(now_s)
            said_s = None
        if event == "told":
            box.on_told_drafter(ONE, Commit(10, (1, 2), gather_s=0.9))
        elif event == "drafts":
            box.put(ONE, drafts(12), now_s)
            said_s = now_s if said_s is None else said_s
        else:
            step = StepReport(STEP_S, 1, 4) if event == "frame" else None
            box.on_frame(TargetFrame((), step, gather_s, 0), now_s)
        if said_s is not None:
            assert box.due_s(now_s) <= said_s + MAX_GATHER_S


def test_what_was_said_of_a_step_that_is_long_over_holds_nobody_back() -> None:
    """The last frame may have told of another coordinator's step."""
    box = outbox(known_costs())
    box.on_frame(frame(0.9), 1.0)
    box.put(ONE, SetK(2), 9.0)
    assert due_in(box, 9.0) == 0.0
    box.take(9.0)
    box.put(TWO, SetK(2), 9.001)
    assert due_in(box, 9.001) == 0.0


def test_nobody_awaits_what_was_to_come_at_once_or_for_a_step_that_is_over() -> None:
    box = busy()
    box.on_told_drafter(ONE, Commit(10, (1, 2)))
    box.on_told_drafter(ONE, CloseSession())
    box.put(ONE, drafts(12), 1.001)
    assert due_in(box, 1.001) == pytest.approx(0.007)
    box.take(1.008)
    box.on_told_drafter(ONE, Commit(12, (1, 2), gather_s=0.004))
    box.on_frame(frame(), 1.010)
    box.put(ONE, drafts(14), 1.011)
    assert box.due_s(1.011) == pytest.approx(1.010 + GATHER_S)


@pytest.mark.parametrize("gather_s", [1e9, math.inf, math.nan, -1.0])
def test_no_target_can_have_anything_held_back_for_long(gather_s: float) -> None:
    box = outbox()
    box.on_frame(frame(gather_s), 1.0)
    box.put(ONE, CloseSession(), 1.0)
    assert due_in(box, 1.0) <= MAX_GATHER_S


def known_costs() -> StepCostModel:
    """1 ms a token."""
    costs = StepCostModel()
    for num_tokens in (1, 1, 1, 10, 10, 10, 40, 40, 40):
        costs.observe(StepReport(0.001 * num_tokens, 1, num_tokens))
    return costs


def test_who_begins_while_an_idle_target_prefills_another_goes_along_with_those_after_it() -> None:
    box = outbox(known_costs())
    box.on_frame(frame(gather_s=0.0, num_tokens=40), 0.0)
    box.put(ONE, opening(40), 1.0)
    assert due_in(box, 1.0) == 0.0
    box.take(1.0)
    box.put(SessionId(2), opening(40), 1.001)
    assert due_in(box, 1.001) == pytest.approx(0.035, rel=0.3)
    assert len(box.take(1.036)) == 1


def test_who_gathers_for_a_prefill_that_is_over_sooner_does_not_wait_for_another_step() -> None:
    box = outbox(known_costs())
    box.on_frame(frame(gather_s=0.0, num_tokens=40), 0.0)
    box.put(ONE, opening(40), 1.0)
    box.take(1.0)
    box.put(SessionId(2), opening(40), 1.001)
    box.on_frame(frame(num_heard=1), 1.020)
    assert due_in(box, 1.020) == 0.0


def test_a_report_that_crossed_with_an_opening_does_not_know_of_its_prefill() -> None:
    box = outbox(known_costs())
    for now_s in (0.99, 1.0):
        box.on_frame(frame(num_heard=1, num_tokens=40), now_s)
    for session_id in (1, 2):
        box.put(SessionId(session_id), opening(40), 1.001)
    box.take(1.008)
    box.on_frame(frame(num_heard=1), 1.010)
    assert box.wanted_in_s(1.010) > 2 * GATHER_S
    box.on_frame(frame(num_heard=2), 1.046)
    assert box.wanted_in_s(1.046) == pytest.approx(GATHER_S)
