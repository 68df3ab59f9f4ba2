"""What steps and waiting cost, learned from noisy times."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.cost import DraftPace, StepCostModel
from speculation.messages import StepReport


def known(step_s: float | None) -> float:
    assert step_s is not None
    return step_s


def line(num_tokens: int, num_sessions: int = 1) -> float:
    return 0.008 + 0.0005 * num_tokens + 0.0002 * num_sessions


def observe_all(
    costs: StepCostModel, sizes: Iterable[tuple[int, int]], noise: Callable[[], float] = lambda: 1.0, times: int = 15
) -> None:
    for _ in range(times):
        for num_tokens, num_sessions in sizes:
            costs.observe(StepReport(line(num_tokens, num_sessions) * noise(), num_sessions, num_tokens))


def test_unknown_until_a_comparable_step_was_seen() -> None:
    costs = StepCostModel()
    assert costs.step_s(1) is None
    costs.observe(StepReport(0.4, 1, 512))
    assert costs.step_s(512) == pytest.approx(0.4)
    assert costs.step_s(1) is None
    costs.observe(StepReport(0.01, 1, 1))
    assert costs.step_s(1) == pytest.approx(0.01, rel=0.05)


def test_reports_of_nothing_are_ignored() -> None:
    costs = StepCostModel()
    for step_s, num_tokens in ((0.0, 1), (-1.0, 1), (0.1, 0), (float("nan"), 1), (float("inf"), 1)):
        costs.observe(StepReport(step_s, 1, num_tokens))
    assert costs.step_s(1) is None


def test_outliers_do_no_harm() -> None:
    rng, costs = random.Random(1), StepCostModel()
    sizes = [(n, 1) for n in range(1, 10)]
    observe_all(
        costs, sizes, lambda: rng.uniform(1.0, 1.04) if rng.random() > 0.2 else rng.uniform(2.0, 50.0), times=40
    )
    for num_tokens, _ in sizes:
        assert known(costs.step_s(num_tokens)) == pytest.approx(line(num_tokens), rel=0.08)


def test_prefill_does_not_spoil_small_steps() -> None:
    costs = StepCostModel()
    for _ in range(50):
        costs.observe(StepReport(1.5, 1, 512))  # three times the price per token of the line
        costs.observe(StepReport(0.9, 4, 300))
    observe_all(costs, [(n, 1) for n in (1, 2, 3, 5)])
    for num_tokens in range(1, 10):
        assert known(costs.step_s(num_tokens)) == pytest.approx(line(num_tokens), rel=0.05)
    assert costs.step_s(512) == pytest.approx(1.5, rel=0.02)


def test_extends_linearly_beyond_what_was_seen() -> None:
    costs = StepCostModel()
    observe_all(costs, [(n, 1) for n in (1, 2, 3, 4)])
    for num_tokens in (5, 9, 20):
        assert known(costs.step_s(num_tokens)) == pytest.approx(line(num_tokens), rel=0.03)


def test_numbers_of_sessions_not_seen_come_from_those_around() -> None:
    costs = StepCostModel()
    observe_all(costs, [(b * (1 + k), b) for b in (1, 2, 8) for k in (0, 1, 2, 4, 8)])
    for k in range(9):
        assert known(costs.step_s(4 * (1 + k), 4)) == pytest.approx(line(4 * (1 + k), 4), rel=0.05)


def test_sessions_cost_apart_from_tokens() -> None:
    costs = StepCostModel()
    for _ in range(15):
        for b in (1, 8):
            for n in (b, 8, 9, 10, 2 * b):
                costs.observe(StepReport(0.01 * b + 0.001 * n, b, n))
    assert known(costs.step_s(8, 1)) == pytest.approx(0.018, rel=0.05)
    assert known(costs.step_s(8, 8)) == pytest.approx(0.088, rel=0.05)


def test_steps_of_the_curve_are_kept() -> None:
    """Batches padded to 4: a line through everything would hide that the tokens up to 8 are free."""
    costs = StepCostModel()
    for _ in range(15):
        for n in range(1, 13):
            costs.observe(StepReport(0.01 * (1 + (n - 1) // 4), 1, n))
    assert known(costs.step_s(8)) < 1.1 * known(costs.step_s(5))
    assert known(costs.step_s(9)) > 1.2 * known(costs.step_s(8))


def test_follows_a_lasting_change() -> None:
    costs = StepCostModel()
    observe_all(costs, [(n, 1) for n in range(1, 6)], times=50)
    observe_all(costs, [(n, 1) for n in range(1, 6)], lambda: 2.0, times=15)
    assert known(costs.step_s(3)) == pytest.approx(2.0 * line(3), rel=0.05)


def test_an_estimate_that_was_too_high_fades_without_being_tried() -> None:
    costs = StepCostModel()
    observe_all(costs, [(9, 1)], lambda: 3.0, times=5)
    observe_all(costs, [(n, 1) for n in range(1, 6)], times=600)
    assert known(costs.step_s(9)) < 1.2 * line(9)


reports = st.lists(
    st.builds(StepReport, st.floats(1e-4, 10.0), st.integers(1, 40), st.integers(1, 600)), min_size=1, max_size=60
)


@given(reports, st.integers(1, 40))
def test_monotone_and_positive_whatever_was_seen(history: list[StepReport], num_sessions: int) -> None:
    costs = StepCostModel()
    for report in history:
        costs.observe(report)
    found = [known(step_s) for n in range(1, 700, 7) if (step_s := costs.step_s(n, num_sessions)) is not None]
    assert found
    assert all(before <= after * (1 + 1e-9) for before, after in itertools.pairwise(found))
    assert found[0] > 0.0


# -- pace -------------------------------------------------------------------------------------------------------


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


def test_what_makes_all_steps_faster_makes_those_faster_that_are_not_seen() -> None:
    """A long sequence is over: its steps, of all sizes, took twice as long. Now only small ones are tried."""

    def true_s(num_tokens: int) -> float:
        return 0.004 + 0.0005 * num_tokens

    model = StepCostModel()
    for index in range(300):
        num_tokens = 1 + index % 13
        model.observe(StepReport(2.0 * true_s(num_tokens), 1, num_tokens))
    for index in range(40):
        num_tokens = 1 + index % 2
        model.observe(StepReport(true_s(num_tokens), 1, num_tokens))
    for num_tokens in (1, 2, 5, 9, 13):
        assert model.step_s(num_tokens) == pytest.approx(true_s(num_tokens), rel=0.1)
