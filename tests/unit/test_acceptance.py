"""Acceptance by depth: censoring, sharing of strength, priors."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.acceptance import PRIOR_WEIGHT, SESSION_WINDOW_STEPS, START_RATE, AcceptanceProfile

steps = st.lists(
    st.tuples(st.integers(0, 10), st.integers(0, 10)).map(lambda pair: (max(pair), min(pair))), max_size=40
)


def drafter(rates: Callable[[int], float], seed: int) -> Callable[[int], int]:
    """Accepted tokens of so many drafted ones, for a drafter whose depth d is right with probability ``rates(d)``."""
    rng = random.Random(seed)

    def accepted(num_drafted: int) -> int:
        num_accepted = 0
        while num_accepted < num_drafted and rng.random() < rates(num_accepted + 1):
            num_accepted += 1
        return num_accepted

    return accepted


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("ks", [(1,), (2,), (4,), (1, 8), (0, 1, 2, 3, 4, 5, 6, 7, 8)], ids=str)
def test_geometric_acceptance_is_recovered_whatever_k_was(rate: float, ks: tuple[int, ...]) -> None:
    """Counting a full acceptance as a failure beyond its end would pull every depth > k to 0."""
    accepted, rng = drafter(lambda depth: rate, seed=1), random.Random(2)
    profile, sums, num_samples = AcceptanceProfile(), [0.0] * 5, 0
    for step in range(6000):
        k = rng.choice(ks)
        profile.observe(k, accepted(k))
        if step >= 500 and step % 10 == 0:
            sums = [total + survival for total, survival in zip(sums, profile.survival(5), strict=True)]
            num_samples += 1
    for depth, total in enumerate(sums, start=1):
        assert total / num_samples == pytest.approx(rate**depth, abs=0.04)


def test_depths_are_told_apart() -> None:
    rates = {1: 0.9, 2: 0.5, 3: 0.8, 4: 0.7}
    accepted, profile = drafter(lambda depth: rates[depth], seed=3), AcceptanceProfile(window_steps=5000.0)
    for _ in range(5000):
        profile.observe(4, accepted(4))
    survival = (1.0, *profile.survival(4))
    for depth, rate in rates.items():
        assert survival[depth] / survival[depth - 1] == pytest.approx(rate, abs=0.03)


@given(steps)
def test_survival_never_rises_and_stays_a_probability(history: list[tuple[int, int]]) -> None:
    profile = AcceptanceProfile()
    for num_drafted, num_accepted in history:
        profile.observe(num_drafted, num_accepted)
    survival = profile.survival(12)
    assert all(0.0 <= after <= before <= 1.0 for before, after in zip((1.0, *survival), survival, strict=False))
    assert profile.survival(3) == survival[:3]
    assert profile.expected_tokens(5) == pytest.approx(1.0 + sum(survival[:5]))


@given(steps)
def test_a_copy_believes_the_same_with_limited_weight(history: list[tuple[int, int]]) -> None:
    prior = AcceptanceProfile(window_steps=1000.0)
    for num_drafted, num_accepted in history:
        prior.observe(num_drafted, num_accepted)
    before = prior.survival(4)
    copy = AcceptanceProfile(prior)
    assert copy.weight <= PRIOR_WEIGHT + 1e-9
    copy.observe(4, 0)
    assert prior.survival(4) == before


def test_steps_without_drafts_say_nothing() -> None:
    profile = AcceptanceProfile()
    profile.observe(4, 3)
    before = profile.survival(4), profile.weight
    for _ in range(100):
        profile.observe(0, 0)
    assert (profile.survival(4), profile.weight) == before


def test_starts_at_the_guess_and_believes_a_few_bad_steps() -> None:
    profile = AcceptanceProfile()
    assert profile.expected_tokens(1) == pytest.approx(1.0 + START_RATE)
    for _ in range(3):
        profile.observe(4, 0)
    assert profile.expected_tokens(8) < 1.25


def test_unseen_depths_lean_on_what_was_seen() -> None:
    good, bad = AcceptanceProfile(), AcceptanceProfile()
    for _ in range(20):
        good.observe(1, 1)
        bad.observe(1, 0)
    assert good.survival(8)[7] > 0.5
    assert bad.survival(8)[0] < 0.02


def test_follows_a_change_within_a_window() -> None:
    profile = AcceptanceProfile()
    for _ in range(500):
        profile.observe(4, 4)
    for _ in range(int(2 * SESSION_WINDOW_STEPS)):
        profile.observe(4, 0)
    assert profile.survival(1)[0] < 0.2


def test_a_session_unlike_the_others_finds_its_own_rate_soon() -> None:
    prior = AcceptanceProfile(window_steps=2000.0)
    for _ in range(2000):
        prior.observe(4, 0)
    session = AcceptanceProfile(prior)
    assert session.survival(1)[0] < 0.02
    for _ in range(10):
        session.observe(4, 4)
    assert session.survival(1)[0] > 0.5
