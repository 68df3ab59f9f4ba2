"""Drafts leave together, in time for the target's next step, and never stay away."""

import math
from typing import TypeAlias

import pytest

from speculation.drafter import DrafterSession, take_frame
from speculation.fingerprint import fingerprint
from speculation.gathering import LEAST_MARGIN, MAX_GATHER_S, Departure, Forecast, FrameTrip, Hearing, RoundTrip
from speculation.guesses import guess_of
from speculation.messages import NOTHING_HEARD, Commit, OpenDraft, OpenTarget, Proposal, Sampling, SessionId
from speculation.simulator import AcceptanceByRun, Costs, Latencies, Load, Scenario, simulate
from speculation.step_schedule import LOOK_EVERY, NO_OUTLOOK, CachedSession, StepEntry, StepSchedule

STEP_S = 0.010

Schedule: TypeAlias = StepSchedule[CachedSession]


def trip_of(*samples_s: float) -> RoundTrip:
    trip = RoundTrip()
    for index, sample_s in enumerate(samples_s, start=1):
        trip.on_told(index, float(index))
        trip.on_answer(index, 0.5, index + 0.5 + sample_s)
    return trip


def drafter(num_drafted: int = 0) -> DrafterSession:
    found = DrafterSession(OpenDraft((1, 2), Sampling(), 12), 50, 100)
    draft(found, num_drafted)
    return found


def draft(session: DrafterSession, count: int) -> None:
    for _ in range(count):
        session.drafted(session.main, guess_of(7, [(8, 1.0)]))


def num_left(proposals: list[Proposal]) -> int:
    return sum(len(one.token_ids) for one in proposals)


# -- how long news take ----------------------------------------------------------------------------------------------


def test_what_has_to_be_here_gathers_for_what_the_trip_leaves_of_the_time() -> None:
    assert trip_of(0.002).gather_s(STEP_S) == pytest.approx(STEP_S - 0.002)
    assert trip_of(0.002).gather_s(None) == 0.0
    assert RoundTrip().gather_s(STEP_S) == 0.0
    assert trip_of(0.050).gather_s(STEP_S) == 0.0  # a long link: late in any case


def test_a_rare_slow_trip_counts_less_than_frequent_ones() -> None:
    assert trip_of(*[0.002] * 8, 0.008).gather_s(STEP_S) == pytest.approx(0.008)
    assert trip_of(*[0.002] * 5, *[0.004] * 4).gather_s(STEP_S) == pytest.approx(0.006)


def test_sessions_start_from_what_is_known_of_the_worker() -> None:
    worker = RoundTrip()
    first = RoundTrip(worker)
    first.on_told(5, 0.0)
    first.on_answer(5, 0.0, 0.003)
    assert RoundTrip(worker).gather_s(STEP_S) == first.gather_s(STEP_S) > 0.0


@pytest.mark.parametrize("held_s", [math.nan, math.inf, -math.inf, -1e30, 5.0])
def test_who_lies_about_time_is_not_believed(held_s: float) -> None:
    trip = RoundTrip()
    trip.on_told(3, 1.0)
    trip.on_answer(3, held_s, 1.1)
    trip.on_answer(4, 0.0, 1.1)  # news that there never were
    assert trip.gather_s(STEP_S) == 0.0


def test_a_target_measures_the_trip_by_what_the_coordinator_says_it_had_heard() -> None:
    target, coordinator = FrameTrip(), Hearing()
    assert coordinator.heard(5.0) == NOTHING_HEARD
    target.on_sent(1.000)
    coordinator.on_frame(5.001)  # by its own clock
    target.on_heard(2, coordinator.heard(5.007), 1.008)  # 1 ms there, held for 6 ms, 1 ms back
    assert target.gather_s(STEP_S) == pytest.approx(STEP_S - 0.002)
    assert target.gather_s(None) == 0.0
    assert target.num_heard == 2


@pytest.mark.parametrize(
    ("shares", "least"),
    [([1.0], 1.0 - LEAST_MARGIN), ([1.0, 1.3], 1.0 - LEAST_MARGIN), ([1.0, 1.0, 0.7, 1.0], 0.7), ([0.6, 0.8], 0.6)],
)
def test_a_step_is_told_as_short_as_the_shortest_ones_turned_out(shares: list[float], least: float) -> None:
    forecast = Forecast()
    assert forecast.at_least_s(STEP_S) == pytest.approx(0.9 * STEP_S)  # before anything is known
    for _ in range(40):
        for share in shares:
            forecast.observe(share * STEP_S)
            assert forecast.at_least_s(STEP_S) is not None
    assert forecast.at_least_s(STEP_S) == pytest.approx(least * STEP_S)
    forecast.at_least_s(None)
    for _ in range(40):
        forecast.observe(0.1 * STEP_S)  # a step that nobody had foreseen says nothing
    assert forecast.at_least_s(STEP_S) == pytest.approx(least * STEP_S)


# -- the target ------------------------------------------------------------------------------------------------------


def test_how_long_a_step_takes_is_foreseen_by_what_is_staged_for_it() -> None:
    schedule, [session] = schedule_after_step(right=True)
    for num_tokens in (1, 1, 1, 5, 5, 5):
        schedule.report([StepEntry(session, [1] * num_tokens, [], True)], 0.001 * num_tokens, 0.0)
    without_s = schedule.outlook([session], 0.0).step_s
    known = session.verifier.token_ids
    session.verifier.stage(Proposal(len(known), fingerprint(known), (5, 6, 7, 8), (1.0,) * 4), 0.0)
    with_drafts_s = schedule.outlook([session], 0.0).step_s
    assert without_s is not None
    assert with_drafts_s is not None
    assert with_drafts_s > 2 * without_s


def schedule_after_step(right: bool, num_sessions: int = 1, **options: bool) -> tuple[Schedule, list[CachedSession]]:
    """Steps of two drafts each, which were right or wrong; nothing is staged behind them."""
    schedule: Schedule = StepSchedule(512)
    sessions = []
    for index in range(num_sessions):
        verifier = schedule.open(OpenTarget((1,), Sampling(), 100, (), 4, **options), 50)
        sessions.append(CachedSession(SessionId(index + 1), verifier))
        verifier.stage(Proposal(1, fingerprint([1]), (2, 3), (1.0, 1.0)), 0.0)
        verifier.conclude([2, 3], [2, 3, 4] if right else [9, 3, 4], 0.0)
        sessions[-1].forget_uncommitted()
    schedule.report([StepEntry(one, [1, 2, 3], [2, 3], True) for one in sessions], STEP_S, 0.0)
    return schedule, sessions


@pytest.mark.parametrize(
    ("right", "num_sessions", "turns", "gathers"),
    [(True, 1, False, True), (False, 1, False, False), (False, 2, False, True), (True, 2, True, False)],
)
def test_nothing_gathers_where_the_target_may_be_waiting(
    right: bool, num_sessions: int, turns: bool, gathers: bool
) -> None:
    schedule, sessions = schedule_after_step(right, num_sessions, turns=turns)
    assert (schedule.outlook(sessions, 0.0).step_s is not None) is gathers
    assert schedule.outlook([], 0.0) == NO_OUTLOOK  # nothing runs


def schedule_that_knows(first_s: float) -> tuple[Schedule, list[CachedSession]]:
    """One session without drafts; the first ones after a miss are known to take so long."""
    schedule, sessions = schedule_after_step(right=False)
    for _ in range(3):
        schedule.report([StepEntry(sessions[0], [1], [], True)], STEP_S, 0.0)
    pace = sessions[0].verifier.pace
    for now_s in (1.0, 2.0, 3.0, 4.0):
        pace.on_verdict(now_s, 1)
        pace.on_verdict(now_s, 0)
        pace.on_proposal(now_s + first_s, 1)
    pace.on_verdict(5.0, 1)
    pace.on_verdict(5.0, 0)
    return schedule, sessions


def test_drafts_that_come_early_in_a_step_that_does_not_wait_gather_but_for_a_look_now_and_then() -> None:
    schedule, sessions = schedule_that_knows(0.7 * STEP_S)
    outlooks = [schedule.outlook(sessions, 5.0) for _ in range(2 * LOOK_EVERY)]
    assert [outlook.step_s is not None for outlook in outlooks] == [*[True] * (LOOK_EVERY - 1), False] * 2
    assert not any(outlook.drafts_at_once for outlook in outlooks)


def test_drafts_that_are_waited_for_leave_at_once() -> None:
    schedule, sessions = schedule_that_knows(0.05 * STEP_S)
    assert {schedule.outlook(sessions, 5.0) for _ in range(2 * LOOK_EVERY)} == {NO_OUTLOOK}


@pytest.mark.parametrize("steps", [0.95, 2.0])
def test_drafts_that_may_miss_the_step_gather_at_the_coordinator_alone(steps: float) -> None:
    schedule, sessions = schedule_that_knows(steps * STEP_S)
    outlooks = [schedule.outlook(sessions, 5.0) for _ in range(LOOK_EVERY - 1)]
    assert all(outlook.drafts_at_once and outlook.step_s is not None for outlook in outlooks)
    assert schedule.outlook(sessions, 5.0) == NO_OUTLOOK  # a look


def test_the_prefills_of_sessions_that_begin_are_foreseen() -> None:
    schedule, sessions = schedule_after_step(right=True)
    for num_tokens in (3, 3, 512, 512):
        entry = StepEntry(sessions[0], [1] * num_tokens, [], True)
        schedule.report([entry], STEP_S * (1 + num_tokens / 100), 0.0)
    alone_s = schedule.outlook(sessions, 0.0).step_s
    begins = CachedSession(SessionId(9), schedule.open(OpenTarget((1,) * 400, Sampling(), 500, (), 4), 50))
    with_prefill_s = schedule.outlook([*sessions, begins], 0.0).step_s
    assert alone_s is not None
    assert with_prefill_s is not None
    assert with_prefill_s > 1.5 * alone_s


# -- the drafter -----------------------------------------------------------------------------------------------------


def test_what_gathers_leaves_in_one_frame_at_the_last_occasion() -> None:
    session = drafter(2)
    session.commit(Commit(2, (7,), gather_s=0.006), now_s=1.0)
    for index in range(5):
        draft(session, 1)
        now_s = 1.001 + 0.001 * index
        assert session.take_proposals(4, now_s, now_s + 0.001) == [], now_s
    draft(session, 1)
    [left] = session.take_proposals(4, 1.006, 1.007)  # at the next occasion it would be too late
    assert len(left.token_ids) == 7
    assert (left.num_committed, left.held_s) == (3, pytest.approx(0.006))


def test_a_token_that_the_target_is_about_to_say_itself_does_not_leave_alone() -> None:
    session = drafter()
    session.commit(Commit(2, (9,), gather_s=0.002), now_s=1.0)
    draft(session, 1)
    assert session.take_proposals(4, 1.002, 1.003) == []
    draft(session, 1)
    assert num_left(session.take_proposals(4, 1.003, 1.004)) == 2
    draft(session, 1)
    assert num_left(session.take_proposals(4, 1.006, 1.007)) == 1  # goes on from what is there


def test_a_target_that_may_be_waiting_gets_the_first_token_at_once() -> None:
    session = drafter()
    session.commit(Commit(2, (9,), gather_s=0.0), now_s=1.0)
    draft(session, 1)
    assert num_left(session.take_proposals(4, 1.002, 1.003)) == 1


def test_nothing_waits_for_a_step_that_there_is_not() -> None:
    session = drafter(1)
    session.commit(Commit(2, (7,), gather_s=0.5), now_s=1.0)
    draft(session, 3)
    assert num_left(session.take_proposals(4, 1.001, math.inf)) == 3


def test_without_news_the_next_ones_leave_a_step_later() -> None:
    session = drafter(2)
    session.commit(Commit(2, (7,), gather_s=0.005), now_s=1.000)
    session.commit(Commit(3, (7,), gather_s=0.005), now_s=1.008)
    draft(session, 2)
    assert num_left(session.take_proposals(4, 1.013, 1.014)) == 2
    draft(session, 1)
    assert session.take_proposals(4, 1.016, 1.017) == []
    assert num_left(session.take_proposals(4, 1.021, 1.022)) == 1


@pytest.mark.parametrize("gather_s", [1e9, math.inf, math.nan, -1.0])
def test_no_coordinator_can_have_drafts_held_back_for_long(gather_s: float) -> None:
    departure = Departure()
    departure.on_news(gather_s, 1.0)
    assert not departure.may_wait_until(1.0 + 2 * MAX_GATHER_S)


def test_a_frame_takes_along_what_would_be_due_soon() -> None:
    """Soon: within a quarter of the target's step, which takes 10 ms here."""
    soon, later, free = drafter(2), drafter(2), drafter(1)
    for session, gather_s in ((soon, 0.009), (later, 0.012)):
        session.commit(Commit(2, (7,), gather_s=gather_s), now_s=1.000)
        session.commit(Commit(3, (7,), gather_s=gather_s), now_s=1.010)
        draft(session, 2)
    assert [num_left(found) for found in take_frame([soon, later], 1, 1.017, 1.018)] == [0, 0]
    assert [num_left(found) for found in take_frame([soon, later, free], 1, 1.017, 1.018)] == [2, 0, 1]


# -- together --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [4, 16])
def test_one_frame_for_one_step_each_way(concurrency: int) -> None:
    """Over whole answers, the first of which begin before anything is known. Before they gathered it was 5 to 7."""
    scenario = Scenario(
        Costs(0.005, 0.0003),
        Costs(0.0006, 0.0001),
        AcceptanceByRun((0.85,)),
        latencies=Latencies(0.0003, 0.0003, 0.0, 0.5),
        load=Load(num_sessions=4 * concurrency, concurrency=concurrency, num_warm_up=concurrency),
    )
    report = simulate(scenario)
    assert report.num_frames_to_target <= 1.1 * report.target_steps


def test_after_a_long_step_nothing_is_held_back_longer_than_the_limit() -> None:
    departure = Departure()
    for now_s in (0.0, 2.5):
        departure.on_news(5.0, now_s)
    departure.on_left(3.5)
    assert departure.due_s(3.5) == 3.5 + MAX_GATHER_S
