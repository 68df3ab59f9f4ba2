"""All that a run depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from speculation.drafter import MAX_LOOKAHEAD
from speculation.relay import lookahead_for
from speculation.simulator.tokens import Acceptance

Points: TypeAlias = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a forward pass, and of what a worker does between two of them."""

    base_s: float
    token_s: float = 0.0
    session_s: float = 0.0
    overhead_s: float = 0.0
    """After every step: applying commands, planning, handing frames over. No step report has it."""
    points: Points = ()
    """Measured ``(tokens, seconds)``, tokens rising: lines between them take the place of ``base_s`` and ``token_s``,
    the last one goes on."""

    def step_s(self, num_tokens: int, num_sessions: int) -> float:
        """A pass over so many tokens of so many sessions."""
        if not self.points:
            return self.base_s + self.token_s * num_tokens + self.session_s * num_sessions
        counts, seconds = zip(*self.points, strict=True)
        if len(counts) > 1 and num_tokens > counts[-1]:
            slope_s = max(0.0, (seconds[-1] - seconds[-2]) / (counts[-1] - counts[-2]))
            return float(seconds[-1] + slope_s * (num_tokens - counts[-1]) + self.session_s * num_sessions)
        return float(np.interp(num_tokens, counts, seconds)) + self.session_s * num_sessions


FREE = Costs(0.0)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds one way, between the coordinator and each of the others."""

    target_s: float = 0.0
    draft_s: float = 0.0
    client_s: float = 0.0
    jitter: float = 0.0
    """A frame takes up to this share longer, at random; frames never overtake each other."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients of one coordinator ask for."""

    num_sessions: int = 16
    num_warm_up: int = 0
    """Sessions before those, in the same way, that count for nothing but what the system learns."""
    concurrency: int = 1
    """Closed load: so many clients, each asking anew when its answer is there."""
    arrivals_per_s: float = 0.0
    """Not 0: open load instead, Poisson arrivals."""
    in_batches: bool = False
    """Closed load: the next ``concurrency`` requests only when all of the last are answered, as `outrider bench`."""
    num_prompt_tokens: int = 32
    num_output_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Scenario:
    """One coordinator, its workers, links and load."""

    target: Costs
    draft: Costs
    acceptance: Acceptance
    runner_up_shares: tuple[float, ...] = (0.6, 0.2)
    """In which share of the misses the drafter's next-best tokens are right; as on the demo pair."""
    latencies: Latencies = Latencies()
    coordinator_s: float = 0.0
    """Handling of one frame; the coordinator handles one at a time."""
    load: Load = Load()
    policy: str | None = "goodput"
    """None is plain decoding."""
    max_k: int = 12
    """The K itself for ``fixed``."""
    max_lookup: int = 12
    turns: bool = False
    """Draft, then verify, never both at a time."""
    max_lookahead: int = 64
    max_branches: int = 4
    flush_tokens: int = 4
    num_targets: int = 1
    num_drafters: int = 1
    max_sessions: int = 64
    """Under way at one target; more wait."""
    max_step_tokens: int = 512
    gathers: bool = True
    """What is said to the target waits until it is of use."""
    seed: int = 0


def plain_of(scenario: Scenario) -> Scenario:
    """The same without speculation, and without all that then makes no difference."""
    latencies = replace(scenario.latencies, draft_s=0.0)
    return replace(scenario, policy=None, turns=False, draft=FREE, latencies=latencies, num_drafters=0)


def ideal_of(scenario: Scenario) -> Scenario:
    """What no drafter can beat: drafts always ready, full K, and nothing but the target's passes takes time.

    Frames cost nothing then, so they do not gather.
    """
    return replace(
        scenario,
        draft=FREE,
        target=replace(scenario.target, overhead_s=0.0),
        latencies=Latencies(),
        coordinator_s=0.0,
        policy="fixed",
        turns=False,
        gathers=False,
        max_lookup=0,
        num_drafters=max(1, scenario.num_drafters),
        max_lookahead=max(scenario.max_lookahead, lookahead_for(scenario.max_k, MAX_LOOKAHEAD)),
    )
