"""The step planner: trimming against brute force, waiting against a small event simulation."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.cost import StepCostModel
from speculation.messages import SessionId, StepReport
from speculation.pace import DraftPace
from speculation.planner import WAIT_CAP_STEPS, Candidate, StepPlan, StepPlanner


def costs_of(step_s: Callable[[int], float], num_sessions: int = 1, max_tokens: int = 40) -> StepCostModel:
    """A cost model that has seen every step size often enough to know it."""
    costs = StepCostModel()
    for num_tokens in range(num_sessions, max_tokens + 1):
        for _ in range(15):
            costs.observe(StepReport(step_s(num_tokens), num_sessions, num_tokens))
    return costs


def pace_of(redraft_s: float, token_s: float) -> DraftPace:
    """A pace that has seen five bursts with these times; the last event is at 40 s."""
    pace = DraftPace()
    for start_s in (0.0, 10.0, 20.0, 30.0, 40.0):
        pace.on_verdict(start_s, 0)
        for index in range(4):
            pace.on_proposal(start_s + redraft_s + index * token_s, 1)
    return pace


def geometric(rate: float, depth: int = 8) -> tuple[float, ...]:
    return tuple(rate**d for d in range(1, depth + 1))


def candidate(
    session: int, num_staged: int, k: int = 8, rate: float = 0.75, pace: DraftPace | None = None
) -> Candidate:
    return Candidate(SessionId(session), num_staged, k, geometric(rate), pace)


# -- trimming ---------------------------------------------------------------------------------------------------


@st.composite
def candidates(draw: st.DrawFn, max_sessions: int = 3, max_k: int = 3) -> list[Candidate]:
    found = []
    for session in range(draw(st.integers(1, max_sessions))):
        rates = draw(st.lists(st.floats(0.0, 1.0), min_size=max_k, max_size=max_k))
        survival = tuple(itertools.accumulate(rates, lambda a, b: a * b))
        k = draw(st.integers(0, max_k))
        lookup_rates = draw(st.lists(st.floats(0.0, 1.0), max_size=max_k))
        looked_up = tuple(itertools.accumulate(lookup_rates, lambda a, b: a * b))
        num_staged = draw(st.integers(0, max_k + 2))
        found.append(Candidate(SessionId(session), num_staged, k, survival, None, looked_up=looked_up))
    return found


step_costs = st.tuples(st.floats(0.001, 0.1), st.lists(st.floats(0.0, 0.05), min_size=30, max_size=30))


def usable(one: Candidate) -> int:
    return min(one.num_staged, one.k) + len(one.looked_up)


def gain(one: Candidate, count: int) -> float:
    """Expected accepted tokens of the first ``count``: staged ones, then looked-up ones behind all of those."""
    num_staged = min(count, one.num_staged, one.k)
    reached = one.survival[num_staged - 1] if num_staged else 1.0
    return sum(one.survival[:num_staged]) + reached * sum(one.looked_up[: count - num_staged])


@given(candidates(), step_costs, st.integers(1, 14), st.integers(0, 6))
def test_trimming_equals_brute_force(
    several: list[Candidate], shape: tuple[float, list[float]], max_step_tokens: int, num_prefill: int
) -> None:
    base_s, rises_s = shape
    curve = [base_s + total for total in itertools.accumulate(rises_s)]
    costs = costs_of(lambda n: curve[n - 1], len(several), 30)
    plan = StepPlanner(costs, max_step_tokens).plan(several, 0.0, 0.0, num_prefill)

    def rate(counts: tuple[int, ...]) -> float:
        num_tokens = len(several) + num_prefill + sum(counts)
        expected = sum(1.0 + gain(one, n) for one, n in zip(several, counts, strict=True))
        step_s = costs.step_s(num_tokens, len(several))
        assert step_s is not None
        return expected / step_s

    room = max(0, max_step_tokens - len(several) - num_prefill)
    choices = itertools.product(*(range(usable(one) + 1) for one in several))
    best = max(rate(counts) for counts in choices if sum(counts) <= room)
    assert rate(tuple(plan.num_drafted[one.session_id] for one in several)) == pytest.approx(best, rel=1e-9)


@given(candidates(max_sessions=6, max_k=5), st.integers(1, 20), st.integers(0, 20), st.booleans())
def test_budgets_hold(several: list[Candidate], max_step_tokens: int, num_prefill: int, known: bool) -> None:
    costs = costs_of(lambda n: 0.01 + 1e-6 * n, len(several)) if known else StepCostModel()
    plan = StepPlanner(costs, max_step_tokens).plan(several, 0.0, 0.0, num_prefill)
    assert set(plan.num_drafted) == {one.session_id for one in several}
    assert all(0 <= plan.num_drafted[one.session_id] <= usable(one) for one in several)
    assert sum(plan.num_drafted.values()) <= max(0, max_step_tokens - num_prefill - len(several))


def test_takes_all_staged_while_costs_are_unknown() -> None:
    plan = StepPlanner(StepCostModel(), 100).plan([candidate(1, 6, k=4), candidate(2, 3, rate=0.01)], 0.0, 0.0)
    assert plan == StepPlan(0.0, {SessionId(1): 4, SessionId(2): 3})


@pytest.mark.parametrize(("chance", "taken"), [(0.9, 8), (0.01, 2)])
def test_looked_up_tokens_fill_the_step_behind_the_staged_ones_where_that_pays(chance: float, taken: int) -> None:
    one = Candidate(SessionId(1), 2, 5, geometric(0.9), None, looked_up=tuple(chance**d for d in range(1, 7)))
    plan = StepPlanner(costs_of(lambda n: 0.02 + 0.001 * n), 100).plan([one], 0.0, 0.0)
    assert plan.num_drafted == {1: taken}


@pytest.mark.parametrize(("chance", "waits"), [(0.9, False), (0.0, True)])
def test_a_step_full_of_likely_tokens_does_not_wait_for_drafts(chance: float, waits: bool) -> None:
    """The drafts would be here in a quarter of a step; without the looked-up tokens that is worth it."""
    looked_up = tuple(chance**d for d in range(1, 5))
    one = Candidate(SessionId(1), 0, 4, geometric(0.9), pace_of(0.005, 0.001), looked_up=looked_up)
    assert one.pace is not None
    one.pace.on_verdict(41.0, 0)
    plan = StepPlanner(costs_of(lambda n: 0.02 + 0.0001 * n), 100).plan([one], 41.0, 0.0)
    assert (plan.wait_s > 0) == waits


@given(st.integers(0, 4), st.floats(0.3, 0.95), st.floats(0.001, 0.03), st.floats(0.0, 0.002))
def test_looked_up_tokens_that_are_never_right_decide_nothing(
    num_staged: int, rate: float, redraft_s: float, token_s: float
) -> None:
    """They are in the step of no plan, so they are not to make running now look dear."""
    plans = []
    for looked_up in ((), (0.0,) * 12):
        pace = pace_of(redraft_s, 0.001)
        pace.on_verdict(50.0, num_staged)
        one = Candidate(SessionId(1), num_staged, 8, geometric(rate), pace, looked_up=looked_up)
        costs = costs_of(lambda n: 0.01 + token_s * n)
        plans.append(StepPlanner(costs, 100).plan([one], 50.0, 0.0))
    assert plans[0] == plans[1]


def test_free_tokens_are_all_taken_and_dear_ones_none() -> None:
    flat, steep = costs_of(lambda n: 0.02), costs_of(lambda n: 0.02 * n)
    assert StepPlanner(flat, 100).plan([candidate(1, 8)], 0.0, 0.0).num_drafted == {1: 8}
    assert StepPlanner(steep, 100).plan([candidate(1, 8)], 0.0, 0.0).num_drafted == {1: 0}


def test_likelier_tokens_go_first_across_sessions() -> None:
    plan = StepPlanner(costs_of(lambda n: 0.02, 2), 6).plan(
        [candidate(1, 8, rate=0.9), candidate(2, 8, rate=0.5)], 0, 0
    )
    assert plan.num_drafted == {1: 4, 2: 0}


def test_no_candidates_is_an_empty_plan() -> None:
    assert StepPlanner(costs_of(lambda n: 0.02), 6).plan([], 0.0, 0.0, 5) == StepPlan(0.0, {})


# -- when not to wait -------------------------------------------------------------------------------------------

CHEAP = (0.0005, 0.0002)  # redraft_s, token_s; next to a step of 28 ms
FLAT_28_MS = costs_of(lambda n: 0.028 + 1e-5 * n)


def wait_s(one: Candidate, waited_s: float = 0.0, now_s: float = 100.0, num_prefill: int = 0) -> float:
    return StepPlanner(FLAT_28_MS, 1000).plan([one], now_s, waited_s, num_prefill).wait_s


def missed_at(now_s: float, redraft_s: float = CHEAP[0], token_s: float = CHEAP[1]) -> DraftPace:
    pace = pace_of(redraft_s, token_s)
    pace.on_verdict(now_s, 0)
    return pace


def test_waits_for_cheap_drafts_after_a_miss() -> None:
    assert 0.0 < wait_s(candidate(1, 0, pace=missed_at(100.0))) < 0.005


@pytest.mark.parametrize(
    "reason",
    [
        candidate(1, 0, pace=None),
        candidate(1, 0, pace=DraftPace()),
        candidate(1, 0, k=0, pace=missed_at(100.0)),
        candidate(1, 0, rate=0.0, pace=missed_at(100.0)),
        candidate(1, 0, rate=0.01, pace=missed_at(100.0)),
        candidate(1, 8, pace=missed_at(100.0)),
        candidate(1, 0, pace=missed_at(90.0)),
        candidate(1, 0, pace=missed_at(100.0, redraft_s=0.025, token_s=0.003)),
        Candidate(SessionId(1), 0, 4, (), missed_at(100.0)),
    ],
    ids=[
        "no drafter",
        "pace unknown",
        "k 0",
        "always wrong",
        "nearly so",
        "all staged",
        "overdue",
        "far",
        "no survival",
    ],
)
def test_does_not_wait(reason: Candidate) -> None:
    assert wait_s(reason) == 0.0


def test_waiting_is_bounded_and_never_holds_up_prefill() -> None:
    one = candidate(1, 0, pace=missed_at(100.0))
    assert wait_s(one, waited_s=WAIT_CAP_STEPS * 0.029) == 0.0
    assert wait_s(one, num_prefill=5) == 0.0


@given(candidates(max_sessions=4, max_k=4), st.lists(st.floats(0.0, 0.1), min_size=8, max_size=8), st.floats(0.0, 0.05))
def test_waits_hold_their_bound_whatever_mix_of_sessions(
    several: list[Candidate], times_s: list[float], waited_s: float
) -> None:
    costs = costs_of(lambda n: 0.028 + 1e-5 * n, len(several))
    mixed = []
    for index, one in enumerate(several):
        pace = pace_of(*times_s[2 * index : 2 * index + 2]) if index % 2 == 0 else None
        if pace is not None:
            pace.on_verdict(99.99, 0)
        mixed.append(Candidate(one.session_id, one.num_staged, one.k, one.survival if one.k else (), pace))
    wait_s = StepPlanner(costs, 1000).plan(mixed, 100.0, waited_s).wait_s
    plain_s = costs.step_s(len(several), len(several))
    assert plain_s is not None
    assert wait_s == 0.0 or waited_s + wait_s <= WAIT_CAP_STEPS * plain_s + 1e-4


def test_many_busy_sessions_just_run() -> None:
    several = [candidate(session, 0, pace=missed_at(100.0)) for session in range(8)]
    costs = costs_of(lambda n: 0.028, len(several), 80)
    assert StepPlanner(costs, 1000).plan(several, 100.0, 0.0).wait_s == 0.0


def test_a_silent_drafter_is_waited_for_once() -> None:
    planner, now_s, waited_s, one = StepPlanner(FLAT_28_MS, 1000), 100.0, 0.0, candidate(1, 0, pace=missed_at(100.0))
    while (plan := planner.plan([one], now_s, waited_s)).wait_s:
        now_s, waited_s = now_s + plan.wait_s, waited_s + plan.wait_s
    assert waited_s < 4 * CHEAP[0]
    for _ in range(20):  # free-runs
        now_s += 0.028
        assert one.pace is not None
        one.pace.on_verdict(now_s, 0)
        assert planner.plan([one], now_s, 0.0).wait_s == 0.0


# -- when to wait: an event simulation --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafted token: right up to (not including) position ``wrong_at`` of its chain."""

    position: int
    wrong_at: float

    def is_live(self, num_committed: int) -> bool:
        return self.position >= num_committed and self.wrong_at >= num_committed


@dataclass(slots=True)
class World:
    """One session, one drafter, one target, a link each way; runs until ``num_tokens`` are committed."""

    draft_s: float
    latency_s: float
    rate: float
    step_s: Callable[[int], float]
    num_tokens: int = 3000
    k: int = 8
    now_s: float = 0.0
    num_committed: int = 0
    num_waits: int = 0
    staged: list[Draft] = field(default_factory=list)
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    ids: itertools.count[int] = field(default_factory=itertools.count)
    pace: DraftPace = field(default_factory=DraftPace)
    chain: int = 0  # restarts of the drafter; tells a draft in the making that it is stale
    known: int = 0  # committed tokens the drafter knows of
    length: int = 0  # its own sequence
    wrong_at: float = float("inf")
    is_drafting: bool = False

    def at(self, time_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time_s, next(self.ids), what))

    def run_until(self, time_s: float) -> None:
        while self.events and self.events[0][0] <= time_s:
            self.now_s, _, what = heapq.heappop(self.events)
            what()
        self.now_s = time_s

    def start_draft(self) -> None:
        if not self.is_drafting and self.length < self.known + 2 * self.k + 2:
            self.is_drafting, chain = True, self.chain
            self.at(self.now_s + self.draft_s, lambda: self.end_draft(chain))

    def end_draft(self, chain: int) -> None:
        self.is_drafting = False
        if chain == self.chain:
            if self.wrong_at > self.length and random.Random(f"{self.length}").random() >= self.rate:
                self.wrong_at = self.length
            draft = Draft(self.length, self.wrong_at)
            self.length += 1
            self.at(self.now_s + self.latency_s, lambda: self.arrive(draft))
        self.start_draft()

    def arrive(self, draft: Draft) -> None:
        is_live = draft.is_live(self.num_committed)
        self.staged += [draft] * is_live
        self.pace.on_proposal(self.now_s, int(is_live))

    def learn(self, num_committed: int) -> None:
        self.known = num_committed
        if self.wrong_at < num_committed or self.length < num_committed:
            self.chain, self.length, self.wrong_at = self.chain + 1, num_committed, float("inf")
        self.start_draft()

    def verify(self, num_drafted: int) -> None:
        drafted = self.staged[:num_drafted]
        self.run_until(self.now_s + self.step_s(1 + num_drafted))
        num_accepted = sum(draft.position < draft.wrong_at for draft in drafted)
        self.num_committed += num_accepted + 1
        num_committed = self.num_committed
        num_before = len(self.staged)
        self.staged = [draft for draft in self.staged if draft.is_live(num_committed)]
        missed = num_before - len(self.staged) > num_accepted + 1 or num_accepted < num_drafted
        self.pace.on_verdict(self.now_s, len(self.staged), missed)
        self.at(self.now_s + self.latency_s, lambda: self.learn(num_committed))

    def simulate(self, decide: Callable[[World, float], StepPlan]) -> float:
        """Committed tokens per second under ``decide(world, waited_s)``."""
        self.at(0.0, self.start_draft)
        waited_s = 0.0
        while self.num_committed < self.num_tokens:
            plan = decide(self, waited_s)
            if plan.wait_s > 0:
                self.num_waits += waited_s == 0.0
                start_s = self.now_s
                next_s = self.events[0][0] if self.events else start_s + plan.wait_s
                self.run_until(min(next_s, start_s + plan.wait_s))
                waited_s += self.now_s - start_s
            else:
                self.verify(plan.num_drafted[SessionId(1)])
                waited_s = 0.0
        return self.num_committed / self.now_s


def planned(world: World, wait_cap_steps: float = WAIT_CAP_STEPS) -> Callable[[World, float], StepPlan]:
    planner = StepPlanner(costs_of(world.step_s, max_tokens=9), 1000, wait_cap_steps=wait_cap_steps)
    survival = geometric(world.rate)

    def decide(world: World, waited_s: float) -> StepPlan:
        one = Candidate(SessionId(1), len(world.staged), world.k, survival, world.pace)
        return planner.plan([one], world.now_s, waited_s)

    return decide


def stubborn(num_wanted: int) -> Callable[[World, float], StepPlan]:
    """Waits for so many drafts before every step, however long it takes."""

    def decide(world: World, waited_s: float) -> StepPlan:
        num_staged = min(len(world.staged), world.k)
        return StepPlan(0.0 if num_staged >= num_wanted else 1.0, {SessionId(1): num_staged})

    return decide


@dataclass(frozen=True, slots=True)
class Setting:
    draft_s: float
    latency_s: float
    rate: float
    plain_s: float = 0.028
    token_s: float = 0.0002

    def world(self) -> World:
        return World(self.draft_s, self.latency_s, self.rate, self.step_s, num_tokens=500)

    def step_s(self, num_tokens: int) -> float:
        return self.plain_s + self.token_s * (num_tokens - 1)


def simulate(setting: Setting, wait_cap_steps: float = WAIT_CAP_STEPS) -> tuple[float, int]:
    """Tokens per second of the planner, and how often it waited."""
    world = setting.world()
    return world.simulate(planned(world, wait_cap_steps)), world.num_waits


@pytest.mark.parametrize("rate", [0.6, 0.75, 0.9])
@pytest.mark.parametrize("draft_s", [0.0005, 0.001])
def test_waits_after_misses_where_drafts_are_cheap_and_near(rate: float, draft_s: float) -> None:
    setting = Setting(draft_s, 0.0003, rate)
    rate_planned, num_waits = simulate(setting)
    rate_running, _ = simulate(setting, wait_cap_steps=0.0)
    assert num_waits > 20
    assert rate_planned > 1.15 * rate_running


@pytest.mark.parametrize(
    "setting",
    [
        Setting(0.003, 0.020, 0.75),
        Setting(0.003, 0.020, 0.75, plain_s=0.008),
        Setting(0.020, 0.020, 0.6),
        Setting(0.006, 0.001, 0.6, plain_s=0.008),
        Setting(0.0005, 0.0003, 0.0),
    ],
    ids=["far", "far, fast target", "slow draft", "slow draft, fast target", "always wrong"],
)
def test_free_runs_where_waiting_does_not_pay(setting: Setting) -> None:
    rate_planned, num_waits = simulate(setting)
    rate_running, _ = simulate(setting, wait_cap_steps=0.0)
    assert num_waits < 40
    assert rate_planned > 0.98 * rate_running


@pytest.mark.parametrize("rate", [0.0, 0.4, 0.75, 0.9])
@pytest.mark.parametrize("link", [(0.0005, 0.0003), (0.001, 0.005), (0.003, 0.001), (0.003, 0.02)])
@pytest.mark.parametrize(("plain_s", "token_s"), [(0.028, 0.00001), (0.028, 0.0007), (0.008, 0.0006)])
def test_never_far_from_the_best_fixed_rule(
    rate: float, link: tuple[float, float], plain_s: float, token_s: float
) -> None:
    """Fixed rules: always run, or always wait for so many drafts; which is best differs from cell to cell."""
    setting = Setting(*link, rate, plain_s, token_s)
    rate_planned, _ = simulate(setting)
    fixed = [simulate(setting, wait_cap_steps=0.0)[0]]
    fixed += [setting.world().simulate(stubborn(num_wanted)) for num_wanted in ((1, 2, 4, 6, 8) if rate else (1,))]
    assert rate_planned > 0.95 * max(fixed)
    assert rate_planned > 0.98 * fixed[0]
