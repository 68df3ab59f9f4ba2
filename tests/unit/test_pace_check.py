"""Drafting is compared with plain decoding by the clock, and given up where it loses, for as long as it does."""

from __future__ import annotations

import random

import pytest

from speculation.adaptive_k import FixedK, Load
from speculation.messages import Verdict
from speculation.pace_check import (
    FIRST_STRETCH_TOKENS,
    MAX_REST_TOKENS,
    MAX_STRETCHES,
    MIN_REST_TOKENS,
    SETTLING_STEPS,
    STRETCH_TOKENS,
    CheckedK,
    OnChange,
    PaceCheck,
)

PLAIN_S = 0.010


class Deployment:
    """Sessions that decode in step; drafting commits `num_tokens` a step and makes a step `slowdown` times as long."""

    def __init__(
        self,
        num_tokens: int,
        slowdown: float,
        num_sessions: int = 1,
        noise: float = 0.0,
        on_change: OnChange = lambda num_sessions, rests: None,
    ) -> None:
        self.num_tokens, self.slowdown, self.noise = num_tokens, slowdown, noise
        self.load = Load(num_sessions)
        self.check = PaceCheck(on_change)
        self.policies = [CheckedK(FixedK(4), self.check) for _ in range(num_sessions)]
        self.now_s = 0.0
        self.num_committed = self.num_steps = self.num_drafting_steps = 0
        self._random = random.Random(3)

    def run(self, num_committed: int) -> None:
        end = self.num_committed + num_committed
        while self.num_committed < end:
            self.step()

    def step(self) -> None:
        are_drafting = [policy.k() > 0 for policy in self.policies]
        step_s = PLAIN_S * (self.slowdown if any(are_drafting) else 1.0)
        self.now_s += step_s * self._random.uniform(1.0, 1.0 + self.noise)
        for policy, is_drafting in zip(self.policies, are_drafting, strict=True):
            num_tokens = self.num_tokens if is_drafting else 1
            policy.observe(Verdict(0, (7,) * num_tokens, num_tokens - 1, num_tokens - 1, 0), self.load, self.now_s)
            self.num_committed += num_tokens
            self.num_steps += 1
            self.num_drafting_steps += is_drafting

    @property
    def plain_ratio(self) -> float:
        """Tokens per second over plain decoding's."""
        return self.num_committed * PLAIN_S / len(self.policies) / self.now_s


@pytest.mark.parametrize("num_sessions", [1, 5])
def test_where_drafting_pays_comparing_costs_next_to_nothing(num_sessions: int) -> None:
    deployment = Deployment(3, 1.5, num_sessions)
    deployment.run(30_000 * num_sessions)
    assert deployment.plain_ratio > 0.99 * 2.0


@pytest.mark.parametrize("num_sessions", [1, 5])
def test_where_it_loses_the_loss_is_small(num_sessions: int) -> None:
    """Every draft is accepted, and yet plain decoding would be faster."""
    deployment = Deployment(2, 2.5, num_sessions)
    deployment.run(50_000 * num_sessions)
    assert deployment.plain_ratio > 0.97
    assert deployment.num_drafting_steps < 0.05 * deployment.num_steps


def test_where_drafting_is_likely_to_win_comparisons_are_put_off_but_not_for_ever() -> None:
    deployment = Deployment(4, 1.0)
    deployment.run(MAX_STRETCHES * FIRST_STRETCH_TOKENS)
    assert deployment.num_drafting_steps == deployment.num_steps
    deployment.run(FIRST_STRETCH_TOKENS)
    assert deployment.num_drafting_steps < deployment.num_steps


@pytest.mark.parametrize("num_sessions", [1, 4])
def test_where_next_to_nothing_comes_in_time_drafting_is_given_up_untimed(num_sessions: int) -> None:
    deployment = Deployment(1, 0.5, num_sessions)  # were it timed, it would win
    deployment.run((FIRST_STRETCH_TOKENS + 2 * SETTLING_STEPS) * num_sessions)
    assert all(policy.k() == 0 for policy in deployment.policies)
    deployment.run(100_000 * num_sessions)
    assert deployment.num_drafting_steps < 0.02 * deployment.num_steps


def test_a_fifth_of_a_token_that_comes_in_bursts_is_not_next_to_nothing() -> None:
    """A drafter 20 ms away: nothing for long, and then a few tokens at once."""
    for seed in range(20):
        deployment = Deployment(1, 1.0)
        bursts = random.Random(seed)
        for _ in range(FIRST_STRETCH_TOKENS):
            deployment.num_tokens = 3 if bursts.random() < 0.1 else 1
            deployment.step()
        deployment.num_tokens = 2
        deployment.run(2 * STRETCH_TOKENS)
        assert deployment.num_drafting_steps > 0.98 * deployment.num_steps


def test_new_sessions_know_what_was_found_out() -> None:
    deployment = Deployment(1, 1.2)
    while not deployment.check.rests:
        deployment.step()
    assert CheckedK(FixedK(4), deployment.check).k() == 0


def test_it_comes_back_when_drafting_pays_again() -> None:
    deployment = Deployment(1, 1.3)
    deployment.run(5 * MAX_REST_TOKENS)
    assert deployment.policies[0].k() == 0
    deployment.slowdown, deployment.num_tokens = 1.1, 3
    deployment.run(MAX_REST_TOKENS + STRETCH_TOKENS)
    assert deployment.policies[0].k() == 4
    assert deployment.policies[0]._comparison._num_losses == 0


def test_one_bad_moment_ends_nothing() -> None:
    deployment = Deployment(3, 1.5)
    deployment.run(MAX_STRETCHES * FIRST_STRETCH_TOKENS - 100)
    deployment.slowdown = 4.0  # somebody else needs the machine while the first comparison is due
    deployment.run(160)
    deployment.slowdown = 1.5
    before = deployment.num_steps
    deployment.run(3000)
    assert deployment.num_steps - before < 1.1 * 1000


def test_outliers_do_not_decide() -> None:
    deployment = Deployment(2, 1.5, noise=0.2)
    for _ in range(5_000):
        deployment.step()
        if deployment.num_steps % 10 == 0:
            deployment.now_s += 0.5  # a step between these two waited for a long prefill
    assert deployment.num_drafting_steps > 0.97 * deployment.num_steps


def test_a_policy_that_does_not_draft_is_not_compared() -> None:
    policy = CheckedK(FixedK(0), PaceCheck())
    for step in range(1000):
        policy.observe(Verdict(0, (7,), 0, 0, 0), Load(1), 0.01 * step)
    assert policy.k() == 0
    assert policy._comparison.allows_drafting


def test_it_is_told_when_drafting_rests_and_when_it_pays_again() -> None:
    told: list[tuple[int, bool]] = []
    deployment = Deployment(2, 2.5, on_change=lambda *one: told.append(one))
    deployment.run(6_000)
    assert told == [(1, True)]
    assert deployment.check.rests
    deployment.slowdown = 1.0
    deployment.run(2 * MAX_REST_TOKENS)
    assert told == [(1, True), (1, False)]
    assert not deployment.check.rests


def test_the_first_rest_is_over_after_a_few_answers() -> None:
    """It may be the noise of a machine, and what comes next another kind of text."""
    deployment = Deployment(2, 2.5)
    while not deployment.check.rests:
        deployment.step()
    num_drafting_steps = deployment.num_drafting_steps
    deployment.run(MIN_REST_TOKENS + 100)
    assert deployment.num_drafting_steps > num_drafting_steps
