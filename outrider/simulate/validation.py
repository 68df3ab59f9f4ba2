"""Simulated against measured: the same cells, with costs and texts of this pair on this machine."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from rich import box
from rich.table import Table

from outrider.bench.stages import read_prompts
from outrider.bench.systems import OUTRIDER, PLAIN
from outrider.simulate.calibration import Calibration, calibrate
from outrider.simulate.measured import (
    DEFAULT_K,
    DEFAULT_POLICY,
    DEMO_PAIR,
    Measured,
    measured_cells,
    pair_options,
    read_bench,
)
from outrider.simulate.settings import TURNS
from speculation.simulator import Latencies, Load, Replay, Report, Scenario, plain_of, session_seed, simulate

_WARM_UP_BATCHES: Final = 2
"""As many as the benchmark runs before it measures."""

_NUM_HALVINGS: Final = 8

GOOD: Final = 0.1
"""A simulation that is further off than this share of the measured rate is not to be relied on."""


_NUM_TOKENS: Final = 128
_NUM_PROMPTS: Final = 6
_NUM_ROUNDS: Final = 6

CELLS: Final = tuple(
    Measured(system, policy, k, concurrency, latency_ms, _NUM_TOKENS)
    for system, policy, k, concurrency, latency_ms in (
        (PLAIN, None, 0, 1, 0.0),
        (OUTRIDER, DEFAULT_POLICY, DEFAULT_K, 1, 0.0),
        (OUTRIDER, DEFAULT_POLICY, DEFAULT_K, 1, 5.0),
        (OUTRIDER, DEFAULT_POLICY, DEFAULT_K, 1, 20.0),
        (OUTRIDER, "fixed", 2, 1, 0.0),
        (TURNS, "fixed", 4, 1, 0.0),
        (PLAIN, None, 0, 4, 0.0),
        (OUTRIDER, DEFAULT_POLICY, DEFAULT_K, 4, 0.0),
    )
)
"""What a validation measures and simulates."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A cell measured and simulated."""

    measured: Measured
    simulated_tokens_per_s: float

    @property
    def error(self) -> float:
        """Simulated / measured - 1."""
        return self.simulated_tokens_per_s / self.measured.tokens_per_s - 1.0


async def validate(bench: Path | None, on_stage: Callable[[str], None]) -> tuple[Calibration, list[Comparison]]:
    """Measures the pair of a benchmark's output, or the demo pair, and simulates `CELLS` and those of the output.

    Raises `BadUsage` if that cannot be read, and `CommandFailed` if the pair cannot be started.
    """
    whole = {"pair": DEMO_PAIR, "settings": {}, "cells": []} if bench is None else read_bench(bench)
    told = measured_cells(whole)
    on_stage("measuring this machine; leave it alone meanwhile")
    prompts = read_prompts(None)[:_NUM_PROMPTS]
    calibration, cells = await calibrate(pair_options(whole), prompts, CELLS, _NUM_ROUNDS)
    on_stage("simulating")
    calibration = await asyncio.to_thread(with_busy_drafter, calibration)
    return calibration, await asyncio.to_thread(compare, [*cells, *told], calibration)


def with_busy_drafter(calibration: Calibration) -> Calibration:
    """The drafter's costs stretched until it drafts as much in the simulation as it did in service.

    How long its steps take there nobody reports: branches, forks and frames are in them, and others have its core.
    """
    if not calibration.proposed_per_token:
        return calibration
    num_tokens, num_runs = calibration.num_output_tokens, len(calibration.texts)
    cell = Measured(OUTRIDER, DEFAULT_POLICY, DEFAULT_K, 1, 0.0, num_tokens, num_runs, 0.0)
    low, high = 0.25, 8.0
    for _ in range(_NUM_HALVINGS):
        factor = (low * high) ** 0.5
        proposed = simulate(scenario_of(cell, _stretched(calibration, factor))).proposed_per_token
        low, high = (factor, high) if proposed > calibration.proposed_per_token else (low, factor)
    return _stretched(calibration, (low * high) ** 0.5)


def _stretched(calibration: Calibration, factor: float) -> Calibration:
    costs = calibration.draft_beside.costs
    longer = replace(costs, base_s=factor * costs.base_s, token_s=factor * costs.token_s)
    return replace(calibration, draft_beside=replace(calibration.draft_beside, costs=longer))


def compare(cells: Sequence[Measured], calibration: Calibration) -> list[Comparison]:
    """Simulates every cell."""
    scenarios = [scenario_of(cell, calibration) for cell in cells]
    return [
        Comparison(cell, _tokens_per_s(simulate(scenario), scenario))
        for cell, scenario in zip(cells, scenarios, strict=True)
    ]


def scenario_of(cell: Measured, calibration: Calibration) -> Scenario:
    """The cell as the benchmark ran it: batches of so many requests, each when the last one is done."""
    num_warm_up = _WARM_UP_BATCHES * cell.concurrency
    target = calibration.target_beside if cell.streams else calibration.target_alone
    draft = calibration.draft_beside if cell.streams else calibration.draft_alone
    texts, seed = calibration.texts, 0
    by_seed = {session_seed(seed, i): texts[i % len(texts)] for i in range(num_warm_up + cell.num_runs)}
    scenario = Scenario(
        target=target.costs,
        draft=draft.costs,
        acceptance=Replay(by_seed, calibration.num_prompt_tokens),
        latencies=Latencies(target_s=target.hop_s, draft_s=draft.hop_s + cell.latency_ms / 1000),
        coordinator_s=calibration.coordinator_s,
        load=Load(
            num_sessions=cell.num_runs,
            num_warm_up=num_warm_up,
            concurrency=cell.concurrency,
            in_batches=True,
            num_prompt_tokens=calibration.num_prompt_tokens,
            num_output_tokens=cell.num_tokens,
        ),
        policy=cell.policy,
        max_k=cell.k,
        turns=cell.system == TURNS,
        seed=seed,
    )
    return scenario if cell.policy is not None else replace(plain_of(scenario), target=target.costs)


def _tokens_per_s(report: Report, scenario: Scenario) -> float:
    """As the benchmark says it: with one request at a time the median of the requests."""
    if scenario.load.concurrency > 1:
        return report.tokens_per_s
    num_tokens = scenario.load.num_output_tokens
    return statistics.median(
        num_tokens / (first_s + (num_tokens - 1) * per_token_s)
        for first_s, per_token_s in zip(report.first_token_s, report.per_token_s, strict=True)
    )


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One line per cell."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("system", no_wrap=True)
    for name in ("at\nonce", "ms\naway", "measured\ntokens/s", "simulated\ntokens/s", "off by"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in comparisons:
        cell = one.measured
        numbers = (f"{cell.tokens_per_s:.1f}", f"{one.simulated_tokens_per_s:.1f}", f"{100 * one.error:+.1f} %")
        style = "" if abs(one.error) <= GOOD else "bold"
        table.add_row(cell.name, str(cell.concurrency), f"{cell.latency_ms:g}", *numbers, style=style)
    return table


def validation_object(calibration: Calibration, comparisons: Sequence[Comparison], command: str) -> dict[str, object]:
    """The whole run as one JSON object."""
    costs = {name: value for name, value in asdict(calibration).items() if name != "texts"}
    rates = [sum(text.foreseen) / len(text.foreseen) for text in calibration.texts]
    return {
        "command": command,
        "calibration": {**costs, "acceptance_by_prompt": rates},
        "comparisons": [comparison_object(one) for one in comparisons],
    }


def comparison_object(one: Comparison) -> dict[str, object]:
    """One element of ``comparisons``."""
    cell = one.measured
    return {
        "system": cell.system,
        "policy": cell.policy,
        "k": cell.k,
        "concurrency": cell.concurrency,
        "one_way_latency_ms": cell.latency_ms,
        "measured_tokens_per_s": cell.tokens_per_s,
        "simulated_tokens_per_s": one.simulated_tokens_per_s,
        "error": one.error,
    }
