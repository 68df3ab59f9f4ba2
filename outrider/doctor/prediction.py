"""What speculation will bring, per K, from the times of bare steps and what the draft got right.

With conditional acceptance a_d at depth d, a step that verifies K drafted tokens commits on average

    E(K) = 1 + sum over d = 1 .. K of a_1 a_2 ... a_d

tokens (with one rate for all depths (1 - a^(K+1)) / (1 - a): Leviathan et al., arXiv 2211.17192, eq. 1). Over plain
decoding, with v(n) the time of a target step over n tokens and t that of a draft step:

    ideal(K)  = E(K) v(1) / v(K + 1)           drafts are always there

and, by Outrider's own session code on a virtual clock with these times, this text and what passes between the workers,

    turns(K)                                   draft, then verify
    stream(K)                                  both at the same time
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from speculation.acceptance import AcceptanceProfile
from speculation.simulator import (
    AcceptanceTraces,
    Costs,
    Latencies,
    Load,
    Scenario,
    plain_of,
    session_seed,
    simulate,
)

HOP_S: Final = 0.0004
"""One way between two processes of one machine: 0.3 to 0.5 ms on the two cores that the demo pair is measured on."""

HANDLING_S: Final = 0.0002
"""What the coordinator does for a frame."""

NUM_SIMULATED: Final = 8
"""Completions behind a simulated figure."""

_EVER: Final = 1e9
"""Steps that a profile remembers: all."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians of bare steps, forward and draws, in seconds."""

    target_s: Mapping[int, float]
    """By the tokens in the step, 1 .. max K + 1."""
    draft_s: float
    """Of one token."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """For one K; speedups are over plain decoding."""

    k: int
    conditional_acceptance: float
    """At depth K."""
    tokens_per_step: float
    ideal: float
    turns: float
    stream: float


@dataclass(frozen=True, slots=True)
class Predictions:
    """At one temperature."""

    temperature: float
    acceptance: float
    """Share of the target's tokens that the draft foresees."""
    by_k: tuple[Prediction, ...]
    adaptive: float
    """Of the stream under the goodput policy, which chooses K itself."""

    @property
    def best(self) -> Prediction:
        """The K with which the stream is fastest."""
        return max(self.by_k, key=lambda one: one.stream)


def predict(
    temperature: float, traces: Sequence[Sequence[bool]], times: StepTimes, max_k: int, latency_s: float
) -> Predictions:
    """``traces[i][j]``: the draft foresaw the target's token j of text i. At least one is not empty."""
    profile = acceptance_profile(traces, max_k)
    survival = (1.0, *profile.survival(max_k))
    scenario = _scenario(traces, times, latency_s)
    plain_per_s = simulate(plain_of(scenario)).tokens_per_s

    def stream(policy: str, k: int, turns: bool = False) -> float:
        return simulate(replace(scenario, policy=policy, max_k=k, turns=turns)).tokens_per_s / plain_per_s

    def of(k: int) -> Prediction:
        tokens, plain_s, verify_s = profile.expected_tokens(k), times.target_s[1], times.target_s[k + 1]
        return Prediction(
            k=k,
            conditional_acceptance=survival[k] / survival[k - 1] if survival[k - 1] else 0.0,
            tokens_per_step=tokens,
            ideal=tokens * plain_s / verify_s,
            turns=stream("fixed", k, turns=True),
            stream=stream("fixed", k),
        )

    whole = [agreed for trace in traces for agreed in trace]
    by_k = tuple(of(k) for k in range(1, max_k + 1))
    return Predictions(temperature, sum(whole) / len(whole), by_k, stream("goodput", max_k))


def acceptance_profile(traces: Sequence[Sequence[bool]], k: int) -> AcceptanceProfile:
    """What verify steps of ``k`` drafted tokens would have seen, one after the other through each text."""
    profile = AcceptanceProfile(window_steps=_EVER)
    for trace in traces:
        position = 0
        while position < len(trace):
            drafted = trace[position : position + k]
            num_accepted = next((index for index, agreed in enumerate(drafted) if not agreed), len(drafted))
            profile.observe(len(drafted), num_accepted)
            position += num_accepted + 1
    return profile


def _scenario(traces: Sequence[Sequence[bool]], times: StepTimes, latency_s: float) -> Scenario:
    usable = [trace for trace in traces if trace]
    num_tokens = min(map(len, usable))
    by_seed = {session_seed(0, index): usable[index % len(usable)] for index in range(2 * NUM_SIMULATED)}
    num_prompt_tokens = 1
    return Scenario(
        target=Costs(times.target_s[1], points=tuple(sorted(times.target_s.items()))),
        draft=Costs(times.draft_s),
        acceptance=AcceptanceTraces(by_seed, num_prompt_tokens),
        latencies=Latencies(target_s=HOP_S, draft_s=HOP_S + latency_s),
        coordinator_s=HANDLING_S,
        load=Load(
            num_sessions=NUM_SIMULATED,
            num_warm_up=NUM_SIMULATED,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_tokens,
        ),
    )
