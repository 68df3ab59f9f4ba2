"""The adaptive-K policies: the threshold rule to the letter, goodput against known cost curves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.acceptance import DEPLOYMENT_WINDOW_STEPS, AcceptanceProfile
from speculation.adaptive_k import (
    ACCEPTED_STEPS,
    HEADROOM,
    MAX_PROBE_EVERY,
    POLICY_NAMES,
    PROBE_STEPS,
    GoodputK,
    KPolicy,
    Load,
    make_policy,
)
from speculation.cost import StepCostModel
from speculation.messages import StepReport, Verdict
from speculation.pace_check import PaceCheck

ALONE = Load(1)


def verdict(num_drafted: int, num_accepted: int) -> Verdict:
    return Verdict(0, (7,) * (num_accepted + 1), num_drafted, num_accepted, 0)


def costs_of(step_s: Callable[[int], float], num_sessions: int = 1, max_k: int = 8) -> StepCostModel:
    costs = StepCostModel()
    for _ in range(15):
        for num_tokens in range(num_sessions, num_sessions * (max_k + 1) + 1):
            costs.observe(StepReport(step_s(num_tokens), num_sessions, num_tokens))
    return costs


def policy_of(name: str, *, max_k: int = 8, k: int | None = None, costs: StepCostModel | None = None) -> KPolicy:
    costs, prior, check = costs or StepCostModel(), AcceptanceProfile(), PaceCheck()
    return make_policy(name, max_k=max_k, k=k, costs=costs, prior=prior, check=check)


class Session:
    """Runs a policy against a drafter with one acceptance rate; drafts appear ``lag`` steps after K leaves 0.

    The target ``takes`` so many of K tokens; all unless it is said. Its own token is compared with the next one.
    """

    def __init__(
        self,
        policy: KPolicy,
        rate: float,
        seed: int = 0,
        load: Load = ALONE,
        lag: int = 3,
        takes: Callable[[int], int] = lambda k: k,
    ) -> None:
        self.policy, self.rate, self.load, self.lag, self.takes = policy, rate, load, lag, takes
        self.rng = random.Random(seed)
        self.num_committed, self.num_drafted, self.num_since_on = 0, 0, lag
        self.num_tokens_in_steps: list[int] = []

    def step(self) -> None:
        k = self.policy.k()
        self.num_since_on = self.num_since_on + 1 if k else 0
        num_drafted = self.takes(k) if self.num_since_on > self.lag else 0
        num_accepted = 0
        while num_accepted < num_drafted and self.rng.random() < self.rate:
            num_accepted += 1
        found = verdict(num_drafted, num_accepted)
        if self.num_since_on > self.lag and num_accepted == num_drafted < k:
            found = replace(found, num_late=1, num_late_right=int(self.rng.random() < self.rate))
        self.policy.observe(found, self.load, 0.0)
        self.num_committed += num_accepted + 1
        self.num_tokens_in_steps.append(num_drafted + 1)

    def run(self, num_committed: int) -> None:
        while self.num_committed < num_committed:
            self.step()


# -- making -----------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert POLICY_NAMES == ("fixed", "threshold", "goodput")
    for name in POLICY_NAMES:
        assert policy_of(name).name == name
        assert policy_of(name, k=3).k() == 3
        assert policy_of(name, max_k=2).k() == 2
        assert policy_of(name, max_k=0).k() == 0


@pytest.mark.parametrize(("name", "max_k", "k"), [("clever", 8, 4), ("fixed", -1, None), ("fixed", 8, -2)])
def test_bad_arguments_are_named(name: str, max_k: int, k: int | None) -> None:
    with pytest.raises(ValueError, match=r"clever.*fixed, threshold, goodput|0 or more"):
        policy_of(name, max_k=max_k, k=k)


def test_fixed_stays() -> None:
    policy = policy_of("fixed", k=5)
    for _ in range(50):
        policy.observe(verdict(5, 0), ALONE, 0.0)
    assert policy.k() == 5


# -- threshold --------------------------------------------------------------------------------------------------


def feed(policy: KPolicy, num_steps: int, num_drafted: int, num_accepted: int) -> list[int]:
    ks = []
    for _ in range(num_steps):
        policy.observe(verdict(num_drafted, num_accepted), ALONE, 0.0)
        ks.append(policy.k())
    return ks


def test_threshold_moves_at_every_tenth_step_by_one_within_its_bounds() -> None:
    policy = policy_of("threshold", max_k=12, k=4)
    ups = feed(policy, 60, 4, 4)
    assert ups == [4] * 9 + [5] * 10 + [6] * 10 + [7] * 10 + [8] * 21
    downs = feed(policy, 80, 4, 0)
    assert downs[-1] == 2
    assert [downs.count(k) for k in (7, 6, 5, 4, 3)] == [10] * 5


@pytest.mark.parametrize(
    ("accepted_of_100", "k"), [(86, 5), (85, 4), (84, 4), (61, 4), (60, 4), (59, 3)], ids=lambda value: str(value)
)
def test_threshold_bounds_are_exclusive(accepted_of_100: int, k: int) -> None:
    policy = policy_of("threshold", k=4)
    for step in range(10):
        policy.observe(verdict(10, accepted_of_100 // 10 + (step < accepted_of_100 % 10)), ALONE, 0.0)
    assert policy.k() == k


def test_threshold_slides_and_ignores_steps_without_drafts() -> None:
    policy = policy_of("threshold", k=4)
    feed(policy, 10, 4, 3)  # 0.75: stays
    feed(policy, 100, 0, 0)
    assert feed(policy, 10, 4, 4) == [4] * 4 + [5] * 6  # 5 of 10 full: 0.875


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=80), st.integers(0, 10))
def test_threshold_follows_the_rule(history: list[tuple[int, int]], max_k: int) -> None:
    policy = policy_of("threshold", max_k=max_k, k=4)
    low, high = min(2, max_k), min(8, max_k)
    k, window = policy.k(), list[tuple[int, int]]()
    for num_drafted, num_accepted in history:
        num_accepted = min(num_drafted, num_accepted)
        policy.observe(verdict(num_drafted, num_accepted), ALONE, 0.0)
        window = [*window, (num_drafted, num_accepted)][-10:] if num_drafted else window
        if num_drafted and len(window) == 10:
            rate = sum(a for _, a in window) / sum(d for d, _ in window)
            wanted = max(low, min(high, k + (rate > 0.85) - (rate < 0.60)))
            k, window = wanted, window if wanted == k else []
        assert policy.k() == k


# -- goodput ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("token_cost", [0.0, 0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("num_sessions", [1, 8])
def test_goodput_is_near_the_best_k_of_the_cost_curve(rate: float, token_cost: float, num_sessions: int) -> None:
    """``token_cost``: of one more token per session, in plain steps. The target takes no more than pay."""

    def step_s(num_tokens: int) -> float:
        return 0.02 * (1.0 + token_cost * (num_tokens / num_sessions - 1.0))

    def goodput(k: int) -> float:
        return sum(rate**depth for depth in range(k + 1)) / step_s(num_sessions * (k + 1))

    def takes(k: int) -> int:
        return max(range(k + 1), key=goodput)

    policy = GoodputK(8, costs_of(step_s, num_sessions), AcceptanceProfile())
    session, found = Session(policy, rate, seed=5, load=Load(num_sessions), takes=takes), []
    for step in range(600):
        session.step()
        if step >= 200:
            found.append(goodput(takes(policy.k())))
    best = max(goodput(k) for k in range(9))
    assert sum(found) / len(found) > 0.94 * best


def test_goodput_weighs_the_load() -> None:
    """At 0.9 acceptance speculation pays for one session and not for many (vLLM #26504)."""
    costs = StepCostModel()
    for _ in range(15):
        for num_sessions in (1, 4, 16, 64):
            for k in range(9):
                num_tokens = num_sessions * (k + 1)
                step_s = max(0.02, 0.0004 * num_tokens) + 0.0003 * num_tokens
                costs.observe(StepReport(step_s, num_sessions, num_tokens))
    policy = policy_of("goodput", costs=costs)
    alone = Session(policy, 0.9)
    alone.run(400)
    assert policy.k() >= 6
    for num_sessions, expected in ((64, range(0, 4)), (1, range(5, 9))):
        policy.observe(verdict(0, 0), Load(num_sessions), 0.0)
        assert policy.k() in expected


def test_k_keeps_out_of_the_way_of_a_target_that_chooses_itself() -> None:
    policy = GoodputK(32, costs_of(lambda n: 0.02 + 0.003 * n, max_k=32), AcceptanceProfile())
    assert feed(policy, 40, 5, 3)[-1] == 3 + HEADROOM
    assert feed(policy, 1, 9, 9) == [9 + HEADROOM]
    assert feed(policy, ACCEPTED_STEPS - 1, 5, 3)[-1] == 9 + HEADROOM  # it may be that sure again
    assert feed(policy, 1, 5, 3) == [3 + HEADROOM]
    assert feed(policy, 100, 0, 0)[-1] == 3 + HEADROOM  # that there were none says nothing
    assert feed(policy, 1, 31, 31) == [32]


def test_k_does_not_grow_with_what_is_taken_for_nothing() -> None:
    """By a target that verifies whatever it may, of a drafter that has gone wrong."""
    prior = AcceptanceProfile(window_steps=DEPLOYMENT_WINDOW_STEPS)
    costs = costs_of(lambda n: 0.02 + 0.001 * n, max_k=16)
    Session(GoodputK(16, costs, prior), 0.9).run(300)
    wrong = Session(GoodputK(16, costs, prior), 0.0, lag=0)
    wrong.run(300)
    assert max(wrong.num_tokens_in_steps[1:]) <= 1 + max(wrong.num_tokens_in_steps[0], HEADROOM + 1)
    assert wrong.policy.k() == 0


def test_who_takes_turns_waits_for_no_more_than_pay() -> None:
    costs = costs_of(lambda n: 0.02 + 0.003 * n)
    ks = {}
    for turns in (True, False):
        policy = make_policy(
            "goodput", max_k=8, k=None, costs=costs, prior=AcceptanceProfile(), check=PaceCheck(), turns=turns
        )
        session = Session(policy, 0.6, seed=3)
        session.run(300)
        ks[turns] = sum(session.num_tokens_in_steps[-60:]) / 60 - 1
    best = max(range(9), key=lambda k: sum(0.6**depth for depth in range(k + 1)) / (0.02 + 0.003 * (k + 1)))
    assert ks[True] == pytest.approx(best, abs=1.0)
    assert ks[False] > ks[True] + 2


def test_k_is_no_less_than_the_average_chain_pays_for() -> None:
    """Of a target that has had but one draft in time lately."""
    policy = GoodputK(12, costs_of(lambda n: 0.02 + 0.0001 * n, max_k=12), AcceptanceProfile())
    feed(policy, 50, 12, 11)
    assert feed(policy, 50, 1, 1)[-1] == 12


def test_goodput_starts_moderately_while_nothing_is_known() -> None:
    assert policy_of("goodput").k() == 4


def test_goodput_holds_still() -> None:
    policy = policy_of("goodput", costs=costs_of(lambda n: 0.02 + 0.001 * n))
    session = Session(policy, 0.75, seed=9)
    session.run(300)
    ks = []
    for _ in range(400):
        session.step()
        ks.append(policy.k())
    assert sum(before != after for before, after in itertools.pairwise(ks)) < 40


@pytest.mark.parametrize("token_cost", [0.02, 0.1, 0.3])
def test_a_useless_drafter_costs_less_than_two_percent(token_cost: float) -> None:
    """From the second session on; the first has to find out."""
    costs = costs_of(lambda n: 0.02 * (1.0 + token_cost * (n - 1)))
    prior = AcceptanceProfile(window_steps=DEPLOYMENT_WINDOW_STEPS)
    shares = []
    for num_tokens in (300, 300, 2000, 10000):
        session = Session(GoodputK(8, costs, prior), 0.0)
        session.run(num_tokens)
        num_extra = sum(n - 1 for n in session.num_tokens_in_steps)
        shares.append(token_cost * num_extra / num_tokens)
    assert shares[0] < 0.05
    assert max(shares[1:]) < 0.02


def test_new_sessions_know_what_the_deployment_knows() -> None:
    costs = costs_of(lambda n: 0.02 + 0.001 * n)
    prior = AcceptanceProfile(window_steps=DEPLOYMENT_WINDOW_STEPS)
    Session(GoodputK(8, costs, prior), 0.0).run(300)
    assert GoodputK(8, costs, prior).k() == 0
    prior = AcceptanceProfile(window_steps=DEPLOYMENT_WINDOW_STEPS)
    Session(GoodputK(8, costs, prior), 0.95).run(300)
    assert GoodputK(8, costs, prior).k() >= 6


@pytest.mark.parametrize("seed", range(5))
def test_comes_back_within_bounded_tokens_when_the_drafter_becomes_good(seed: int) -> None:
    policy = GoodputK(8, costs_of(lambda n: 0.02 + 0.001 * n), AcceptanceProfile())
    session = Session(policy, 0.0, seed=seed)
    session.run(20000)
    assert policy.k() <= 2
    session.rate = 0.8
    session.run(20000 + 2 * MAX_PROBE_EVERY + 100)
    ks = []
    for _ in range(100):
        session.step()
        ks.append(policy.k())
    assert min(ks) >= 2


def test_probes_end_and_become_rare() -> None:
    policy = GoodputK(8, costs_of(lambda n: 0.02 + 0.001 * n), AcceptanceProfile())
    session, starts, before = Session(policy, 0.0), [], 0
    session.run(200)
    for step in range(20000):
        session.step()
        if policy.k() and not before:
            starts.append(step)
        before = policy.k()
    gaps = [after - first for first, after in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= MAX_PROBE_EVERY
    assert gaps[-1] < MAX_PROBE_EVERY + 4 * PROBE_STEPS


def test_a_probe_without_drafts_gives_up() -> None:
    policy = GoodputK(8, costs_of(lambda n: 0.02 + 0.001 * n), AcceptanceProfile())
    feed(policy, 10, 4, 0)
    assert policy.k() == 0
    ks = feed(policy, 2000, 0, 0)
    assert 0.0 < sum(map(bool, ks)) / len(ks) < 0.05


def test_a_drafter_that_is_always_late_and_always_wrong_is_found_out() -> None:
    policy = policy_of("goodput", costs=costs_of(lambda num_tokens: 0.010 + 0.0005 * num_tokens))
    late_and_wrong = Verdict(0, (7,), 0, 0, 0, num_late=1, num_late_right=0)
    for _ in range(10):
        policy.observe(late_and_wrong, ALONE, 0.0)
    assert policy.k() == 0


def test_a_drafter_that_is_late_and_right_is_not_given_up() -> None:
    policy = policy_of("goodput", costs=costs_of(lambda num_tokens: 0.010 + 0.0005 * num_tokens))
    for _ in range(50):
        policy.observe(Verdict(0, (7,), 0, 0, 0, num_late=3, num_late_right=3), ALONE, 0.0)
    assert policy.k() > 3
