"""When drafts are expected, by when others came."""

from __future__ import annotations

import pytest

from speculation.pace import DraftPace


def known(wait_s: float | None) -> float:
    assert wait_s is not None
    return wait_s


def burst(pace: DraftPace, now_s: float, redraft_s: float, token_s: float, num_tokens: int = 4) -> None:
    pace.on_verdict(now_s, 0)
    for index in range(num_tokens):
        pace.on_proposal(now_s + redraft_s + index * token_s, 1)


def paced(redraft_s: float = 0.006, token_s: float = 0.003) -> DraftPace:
    pace = DraftPace()
    for start_s in range(5):
        burst(pace, float(start_s), redraft_s, token_s)
    return pace


def test_unknown_at_first() -> None:
    pace = DraftPace()
    assert pace.expected_wait_s(1, 0.0) is None
    pace.on_verdict(1.0, 0)
    assert pace.expected_wait_s(1, 1.0) is None


def test_learns_redraft_and_token_times() -> None:
    pace = paced()
    assert pace.redraft_s == pytest.approx(0.006)
    assert pace.token_s == pytest.approx(0.003)
    pace.on_verdict(10.0, 0)
    assert pace.expected_wait_s(1, 10.0) == pytest.approx(0.006)
    assert pace.expected_wait_s(3, 10.002) == pytest.approx(0.010)
    pace.on_proposal(10.006, 1)
    assert pace.expected_wait_s(2, 10.007) == pytest.approx(0.005)


def test_outliers_do_not_move_it() -> None:
    pace = paced()
    burst(pace, 10.0, 0.9, 0.5)
    assert pace.redraft_s == pytest.approx(0.006)
    assert pace.token_s == pytest.approx(0.003)


def test_late_drafts_are_expected_ever_later_and_then_not_at_all() -> None:
    pace = paced()
    pace.on_verdict(10.0, 0)
    waits = [pace.expected_wait_s(1, 10.0 + elapsed_s) for elapsed_s in (0.007, 0.010, 0.0119)]
    assert waits == sorted(known(wait_s) for wait_s in waits)
    for elapsed_s in (0.013, 1.0, 100.0):
        assert pace.expected_wait_s(1, 10.0 + elapsed_s) is None


def test_drafts_that_gathered_say_nothing_of_how_soon_they_could_come() -> None:
    pace = paced()
    for start_s in range(10, 30):
        pace.on_verdict(float(start_s), 1)
        pace.on_verdict(float(start_s), 0)
        pace.on_gathering(float(start_s))
        pace.on_proposal(start_s + 0.012, 1)
    assert pace.redraft_s == pytest.approx(0.006)
    for start_s in range(30, 40):  # these were on their way before anybody was told to gather
        pace.on_verdict(float(start_s), 0)
        pace.on_gathering(start_s + 0.010)
        pace.on_proposal(start_s + 0.008, 1)
    assert pace.redraft_s == pytest.approx(0.008)


def test_free_runs_do_not_make_a_silent_drafter_expected_again() -> None:
    pace = paced()
    for verdict in range(30):
        pace.on_verdict(10.0 + 0.02 * verdict, 0)
    assert pace.expected_wait_s(1, 10.6) is None


def test_a_slow_drafter_does_not_look_fast_because_of_free_runs() -> None:
    pace = DraftPace()
    for start_s in range(5):
        for verdict in range(5):  # drafts take 45 ms, a step 10
            pace.on_verdict(start_s + 0.01 * verdict, 0)
            pace.on_proposal(start_s + 0.01 * verdict + 0.004, 0)  # stale ones
        pace.on_proposal(start_s + 0.045, 1)
    assert pace.redraft_s == pytest.approx(0.045)


def test_stale_drafts_start_the_clock_again() -> None:
    pace = paced()
    pace.on_verdict(10.0, 0)
    pace.on_verdict(10.028, 0)
    assert pace.expected_wait_s(1, 10.028) is None
    pace.on_proposal(10.028, 0)
    assert pace.expected_wait_s(1, 10.028) == pytest.approx(0.006)


def test_a_paused_drafter_is_no_slow_one() -> None:
    pace = paced()
    for verdict in range(100):
        pace.on_verdict(10.0 + verdict, 0)
    for _ in range(9):
        pace.on_proposal(110.0, 1)
    assert pace.redraft_s == pytest.approx(0.006)


def test_after_full_acceptance_the_next_draft_is_on_its_way() -> None:
    pace = paced()
    pace.on_verdict(10.0, 0, missed=False)
    assert pace.expected_wait_s(1, 10.0) == pytest.approx(0.003)
    pace.on_proposal(10.5, 1)
    assert pace.redraft_s == pytest.approx(0.006)


def test_tokens_that_come_together_share_the_time() -> None:
    pace = DraftPace()
    for start_s in range(3):
        pace.on_verdict(float(start_s), 0)
        for arrival_s, num_tokens in ((0.006, 1), (0.006, 1), (0.012, 1), (0.021, 3)):
            pace.on_proposal(start_s + arrival_s, num_tokens)
    assert pace.token_s == pytest.approx(0.003)


def test_sessions_learn_from_one_another_through_the_prior() -> None:
    shared = DraftPace()
    burst(DraftPace(shared), 0.0, 0.006, 0.003)
    other = DraftPace(shared)
    other.on_verdict(5.0, 0)
    assert other.expected_wait_s(2, 5.0) == pytest.approx(0.009)


def test_a_branch_ends_the_wait_for_drafts_and_says_nothing_of_the_pace() -> None:
    pace = paced()
    pace.on_verdict(10.0, 0)
    pace.on_branch(10.1)
    for verdict_s in (10.2, 10.3, 10.4):  # what is staged is verified, and missed again
        pace.on_verdict(verdict_s, 0)
    for _ in range(9):
        pace.on_verdict(11.0, 1)
        pace.on_verdict(12.0, 0)
        pace.on_branch(12.5)
        pace.on_verdict(13.0, 0)
        pace.on_proposal(13.007, 1)
    assert pace.redraft_s == pytest.approx(0.007)
