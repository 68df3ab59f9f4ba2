"""What steps cost, learned from noisy times."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.cost import MAX_STEP_S, MIN_STEP_S, StepCostModel
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
    for step_s, num_tokens in ((0.0, 1), (-1.0, 1), (0.1, 0), (float("nan"), 1), (float("inf"), 1), (5e-324, 1)):
        costs.observe(StepReport(step_s, 1, num_tokens))
    assert costs.step_s(1) is None


@pytest.mark.parametrize("times_s", [(1e308, 5e-324), (MAX_STEP_S, MIN_STEP_S), (1e-9, 1e-3)])
def test_nothing_that_is_reported_makes_an_estimate_that_is_no_number(times_s: tuple[float, float]) -> None:
    costs = StepCostModel()
    for index in range(200):
        costs.observe(StepReport(times_s[index % 2], 1 + index % 3, 1 + index % 7))
        step_s = costs.step_s(1 + index % 7)
        assert step_s is None or 0.0 < step_s < math.inf


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
