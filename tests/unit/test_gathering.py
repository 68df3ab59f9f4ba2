"""Drafts leave together, in time for the target's next step, and never stay away."""

import math

import pytest

from speculation.acceptance import AcceptanceProfile
from speculation.cost import DraftPace
from speculation.drafter import DrafterSession, take_frame
from speculation.fingerprint import fingerprint
from speculation.gathering import MAX_GATHER_S, Departure, Outlook, RoundTrip
from speculation.guesses import guess_of
from speculation.messages import Commit, OpenDraft, OpenTarget, Proposal, Sampling, Verdict
from speculation.simulator import AcceptanceByRun, Costs, Latencies, Load, Scenario, simulate
from speculation.verifier import VerifierSession

STEP_S = 0.010


def reply(num_committed: int, held_s: float) -> Proposal:
    return Proposal(num_committed, 0, (1,), (1.0,), num_committed=num_committed, held_s=held_s)


def trip_of(*samples_s: float) -> RoundTrip:
    trip = RoundTrip()
    for index, sample_s in enumerate(samples_s, start=1):
        trip.on_verdict(index, float(index))
        trip.on_proposal(reply(index, 0.5), index + 0.5 + sample_s)
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


# -- the target ------------------------------------------------------------------------------------------------------


def test_drafts_gather_for_what_the_step_lasts_longer_than_the_trip() -> None:
    assert trip_of(0.002).gather_s(STEP_S) == pytest.approx(0.9 * STEP_S - 0.002)
    assert trip_of(0.002).gather_s(None) == 0.0
    assert RoundTrip().gather_s(STEP_S) == 0.0
    assert trip_of(0.050).gather_s(STEP_S) == 0.0  # a long link: late in any case


def test_a_rare_slow_trip_counts_less_than_frequent_ones() -> None:
    assert trip_of(*[0.002] * 8, 0.008).gather_s(STEP_S) == pytest.approx(0.007)
    assert trip_of(*[0.002] * 5, *[0.004] * 4).gather_s(STEP_S) == pytest.approx(0.005)


def test_sessions_start_from_what_the_worker_knows() -> None:
    worker = RoundTrip()
    first = RoundTrip(worker)
    first.on_verdict(5, 0.0)
    first.on_proposal(reply(5, 0.0), 0.003)
    assert RoundTrip(worker).gather_s(STEP_S) == first.gather_s(STEP_S) > 0.0


@pytest.mark.parametrize("held_s", [math.nan, math.inf, -math.inf, -1e30, 5.0])
def test_a_drafter_that_lies_about_time_is_not_believed(held_s: float) -> None:
    trip = RoundTrip()
    trip.on_verdict(3, 1.0)
    trip.on_proposal(reply(3, held_s), 1.1)
    trip.on_proposal(reply(4, 0.0), 1.1)  # of a verdict that there never was
    assert trip.gather_s(STEP_S) == 0.0


def verdict_of(trip: RoundTrip, outlook: Outlook | None, right: bool, k: int = 4) -> Verdict:
    command = OpenTarget((1,), Sampling(), 100, (), k)
    target = VerifierSession(command, 50, AcceptanceProfile(), DraftPace(), trip)
    target.stage(Proposal(1, fingerprint([1]), (2, 3), (1.0, 1.0)), 0.0)
    return target.conclude([2, 3], [2, 3, 4] if right else [9, 3, 4], 0.0, outlook)


def test_nothing_gathers_where_the_target_may_be_waiting() -> None:
    trip, alone, among_others = trip_of(0.002), Outlook(STEP_S, may_wait=True), Outlook(STEP_S, may_wait=False)
    assert verdict_of(trip, alone, right=True).gather_s > 0.0
    assert verdict_of(trip, alone, right=False).gather_s == 0.0
    assert verdict_of(trip, among_others, right=False).gather_s > 0.0
    assert verdict_of(trip, None, right=True).gather_s == 0.0
    assert verdict_of(trip, alone, right=True, k=0).gather_s == 0.0


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
    departure.on_commit(gather_s, 1.0)
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
def test_one_frame_of_drafts_for_one_step(concurrency: int) -> None:
    """Over whole answers: the drafts of a session that begins leave at once. Before they gathered it was 5 to 7."""
    scenario = Scenario(
        Costs(0.005, 0.0003),
        Costs(0.0006, 0.0001),
        AcceptanceByRun((0.85,)),
        latencies=Latencies(0.0003, 0.0003, 0.0, 0.5),
        load=Load(num_sessions=4 * concurrency, concurrency=concurrency),
    )
    report = simulate(scenario)
    num_draft_frames = (report.num_frames - 2 * report.target_steps) / 2  # each comes and goes on; verdicts, commits
    assert num_draft_frames < 2.3 * report.target_steps
