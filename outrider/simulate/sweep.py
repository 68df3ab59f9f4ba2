"""Every combination of the settings, simulated: deployments are independent, so they run in processes side by side."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from outrider.simulate.settings import TURNS, SimulateSettings, rates_of
from speculation.simulator import (
    AcceptanceByRun,
    Costs,
    Latencies,
    Load,
    Report,
    Scenario,
    ideal_of,
    merged,
    plain_of,
    simulate,
)

PLAIN: Final = "plain"
IDEAL: Final = "ideal"

RunAll: TypeAlias = Callable[[Iterable[Scenario]], Iterator[Report]]


@dataclass(frozen=True, slots=True)
class Condition:
    """What the systems that are compared have in common."""

    latency_ms: float
    acceptance: str
    concurrency: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One system under one condition."""

    system: str
    condition: Condition
    report: Report
    ratio_to_plain: float
    ratio_to_ideal: float


def conditions(settings: SimulateSettings) -> list[Condition]:
    """All combinations, the last axis fastest."""
    axes = itertools.product(settings.concurrencies, settings.acceptances, settings.latencies_ms)
    return [Condition(latency_ms, acceptance, concurrency) for concurrency, acceptance, latency_ms in axes]


def scenario_of(settings: SimulateSettings, condition: Condition, system: str) -> Scenario:
    """One deployment of ``system``, which may also be `PLAIN` or `IDEAL`."""
    scenario = Scenario(
        target=_costs(
            settings.target_ms, settings.target_token_ms, settings.target_session_ms, settings.target_overhead_ms
        ),
        draft=_costs(settings.draft_ms, settings.draft_token_ms, settings.draft_session_ms, settings.draft_overhead_ms),
        acceptance=AcceptanceByRun(rates_of(condition.acceptance)),
        latencies=Latencies(
            target_s=settings.target_latency_ms / 1000,
            draft_s=condition.latency_ms / 1000,
            client_s=settings.client_latency_ms / 1000,
            jitter=settings.jitter,
        ),
        coordinator_s=settings.handling_ms / 1000,
        load=Load(
            num_sessions=settings.sessions,
            concurrency=condition.concurrency,
            arrivals_per_s=settings.arrivals_per_s,
            num_prompt_tokens=settings.prompt_tokens,
            num_output_tokens=settings.max_tokens,
        ),
        policy="fixed" if system in (TURNS, PLAIN, IDEAL) else system,
        turns=system == TURNS,
        max_k=settings.max_k,
        max_lookahead=settings.max_lookahead,
        max_branches=settings.max_branches,
        runner_up_shares=rates_of(settings.runner_up_shares),
        num_targets=settings.targets,
        num_drafters=settings.drafters,
        max_sessions=settings.max_sessions,
        seed=settings.seed,
    )
    return {PLAIN: plain_of, IDEAL: ideal_of}.get(system, _unchanged)(scenario)


def _costs(base_ms: float, token_ms: float, session_ms: float, overhead_ms: float) -> Costs:
    return Costs(base_ms / 1000, token_ms / 1000, session_ms / 1000, overhead_ms / 1000)


def _unchanged(scenario: Scenario) -> Scenario:
    return scenario


class Sweep:
    """All cells of a command."""

    def __init__(self, settings: SimulateSettings) -> None:
        self._settings = settings
        self._conditions = conditions(settings)
        self._scenarios = {
            (condition, system): scenario_of(settings, condition, system)
            for condition in self._conditions
            for system in (PLAIN, IDEAL, *settings.system_list)
        }
        self._distinct = list(dict.fromkeys(self._scenarios.values()))  # plain is the same at all latencies

    @property
    def num_runs(self) -> int:
        return len(self._distinct) * self._settings.deployments

    @property
    def num_sessions(self) -> int:
        """Of all runs together."""
        return self.num_runs * self._settings.sessions

    def run(self, on_run: Callable[[], None] = lambda: None) -> list[Cell]:
        """Simulates everything; ``on_run`` is called after each of `num_runs` runs."""
        reports: dict[Scenario, Report] = {}
        with _runner(self._num_processes()) as run_all:
            results = run_all(one for scenario in self._distinct for one in self._deployments(scenario))
            for scenario in self._distinct:
                several = []
                for report in itertools.islice(results, self._settings.deployments):
                    several.append(report)
                    on_run()
                reports[scenario] = merged(several)
        return [cell for condition in self._conditions for cell in self._cells(condition, reports)]

    def _deployments(self, scenario: Scenario) -> list[Scenario]:
        first = scenario.seed * self._settings.deployments
        return [replace(scenario, seed=first + index) for index in range(self._settings.deployments)]

    def _num_processes(self) -> int:
        return min(self._settings.processes or os.cpu_count() or 1, self.num_runs)

    def _cells(self, condition: Condition, reports: dict[Scenario, Report]) -> list[Cell]:
        found = {
            system: reports[self._scenarios[condition, system]]
            for system in (PLAIN, *self._settings.system_list, IDEAL)
        }
        plain, ideal = found[PLAIN].tokens_per_s, found[IDEAL].tokens_per_s
        return [
            Cell(system, condition, report, report.tokens_per_s / plain, report.tokens_per_s / ideal)
            for system, report in found.items()
        ]


@contextmanager
def _runner(num_processes: int) -> Iterator[RunAll]:
    """Simulates scenarios in order, in this process or in several."""
    if num_processes < 2:
        yield lambda scenarios: map(simulate, scenarios)
        return
    context = multiprocessing.get_context("spawn")  # a fork would take the threads' locks of gRPC along
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        try:
            yield lambda scenarios: pool.map(simulate, scenarios)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
