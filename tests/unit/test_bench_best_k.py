"""How near the policy comes to the best fixed K: chosen by other rounds than those it is judged by."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest

from outrider.bench.best_k import BestK, Pace, best_k
from outrider.bench.estimates import Estimate
from outrider.bench.measure import Round
from outrider.bench.systems import OUTRIDER, PLAIN, Run, Task, fixed_k_name
from tests.unit.test_bench import stats

TASK = Task(0, "a prompt", 10, 0.0, 0)


def rounds(seconds: Sequence[float], num_steps: int | None = None) -> list[Round]:
    """Ten tokens in so many seconds, of which the first takes a tenth."""
    speculation = None if num_steps is None else stats(num_drafted=10, num_accepted=8, num_steps=num_steps)
    return [Round((TASK,), (Run(tuple(range(10)), one / 10, 1, one, speculation),)) for one in seconds]


def test_without_a_fixed_k_there_is_none() -> None:
    assert best_k({OUTRIDER: rounds([1.0]), PLAIN: rounds([2.0])}) is None


def test_one_that_is_always_faster_is_the_best() -> None:
    found = best_k({OUTRIDER: rounds([1.0, 2.0, 4.0]), "outrider-fixed-2": rounds([0.9, 1.8, 3.6]), **slow(3)})

    assert found is not None
    assert found.name == fixed_k_name(2)
    assert found.share.value == pytest.approx(0.9)
    assert found.share.spread == (pytest.approx(0.9), pytest.approx(0.9))
    assert found.error == pytest.approx(0.0)
    assert not found.is_enough
    assert not found.may_be_enough


def slow(num_rounds: int) -> dict[str, list[Round]]:
    return {fixed_k_name(8): rounds([9.0] * num_rounds)}


def test_the_lucky_round_does_not_choose_what_it_is_held_against() -> None:
    """Each K is twice as fast in one round, and as fast as the policy in the others, which therefore choose another."""
    lucky = {fixed_k_name(k): rounds([0.5 if k == one else 1.0 for one in range(3)]) for k in range(3)}

    found = best_k({OUTRIDER: rounds([1.0, 1.0, 1.0]), **lucky})

    assert found is not None
    assert found.share.value == pytest.approx(1.0)


def test_equals_are_equal_on_average() -> None:
    """Where the fastest of all rounds is the measure, five equals with noise of 12 % make it some 5 % too low."""
    noise = random.Random(1)

    def noisy() -> list[Round]:
        return rounds([noise.lognormvariate(0.0, 0.12) for _ in range(6)])

    shares = []
    for _ in range(400):
        found = best_k({OUTRIDER: noisy(), **{fixed_k_name(k): noisy() for k in range(5)}})
        assert found is not None
        shares.append(found.share.value)

    assert statistics.mean(shares) == pytest.approx(1.0, abs=0.012)


def test_a_single_round_has_to_choose_for_itself() -> None:
    found = best_k({OUTRIDER: rounds([1.0]), fixed_k_name(2): rounds([0.8]), **slow(1)})

    assert found is not None
    assert (found.name, found.share.value, found.error) == (fixed_k_name(2), pytest.approx(0.8), None)
    assert not found.may_be_enough


def test_steps_say_what_it_is() -> None:
    found = best_k({OUTRIDER: rounds([1.0, 1.0], num_steps=5), fixed_k_name(2): rounds([0.8, 0.8], num_steps=4)})

    assert found is not None
    assert found.paces == (
        Pace(2.0, pytest.approx(0.18)),  # 0.9 s for five steps
        Pace(2.5, pytest.approx(0.18)),
    )


def test_chance_is_two_standard_errors() -> None:
    found = BestK(fixed_k_name(2), Estimate(0.9, 0.85, 0.95), 0.03, None)

    assert found.may_be_enough
    assert not replace(found, error=0.02).may_be_enough
    assert not replace(found, error=None).may_be_enough
