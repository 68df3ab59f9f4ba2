"""The pair as it works in service: what its steps cost while drafts are on their way, and how fast it is then.

On a machine with few cores this is what counts: frames are decoded, drafts are made and text is sent while the target
computes, and all of it takes from the same cores.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeAlias

from coordinator.clients import CommandT, FrameT, OnLost, WorkerClient, WorkerConnection
from coordinator.coordinator import Coordinator
from coordinator.delay import DelayedClient
from coordinator.grpc_clients import TokenizerCache, grpc_draft_client, grpc_target_client
from coordinator.requests import GenerateRequest, SpeculationOptions
from coordinator.settings import CoordinatorSettings
from outrider.simulate.measured import Measured
from outrider.simulate.settings import TURNS
from rpc.draft_codec import DraftFrame
from speculation.cost import closest_never_falling
from speculation.messages import DraftCommand, ModelInfo, Proposal, StepReport, TargetCommand, TargetFrame
from speculation.simulator import Costs

MIN_SAMPLES: Final = 5
"""Steps of one size, for their median to count."""

_PREFILL_TOKENS: Final = 16
"""A step with so many tokens for each session is a prefill."""


class RecordingClient(Generic[CommandT, FrameT]):
    """A `WorkerClient` that keeps every frame and when it came."""

    def __init__(self, inner: WorkerClient[CommandT, FrameT]) -> None:
        self.frames: list[tuple[float, FrameT]] = []
        self._inner = inner

    @property
    def name(self) -> str:
        return self._inner.name

    async def describe(self) -> tuple[ModelInfo, bytes]:
        return await self._inner.describe()

    async def connect(self, on_frame: Callable[[FrameT], None], on_lost: OnLost) -> WorkerConnection[CommandT]:
        def record(frame: FrameT) -> None:
            self.frames.append((time.perf_counter(), frame))
            on_frame(frame)

        return await self._inner.connect(record, on_lost)

    async def close(self) -> None:
        await self._inner.close()


TargetClients: TypeAlias = RecordingClient[TargetCommand, TargetFrame]
DraftClients: TypeAlias = RecordingClient[DraftCommand, DraftFrame]


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of one run: when each one's frame came, and what it reported."""

    reports: Sequence[tuple[float, StepReport]]

    def between_s(self) -> list[float]:
        """From each step to the next, without its own time and its waiting."""
        return [
            later_s - earlier_s - report.step_s - report.waited_s
            for (earlier_s, _), (later_s, report) in itertools.pairwise(self.reports)
        ]


@dataclass(frozen=True, slots=True)
class InService:
    """What was seen."""

    target_alone: Costs
    """One model at work at a time: plain decoding and taking turns."""
    target_beside: Costs
    """While drafts are made."""
    proposed_per_token: float
    """Drafted tokens that came, per token generated, one request at a time under the default policy, nothing far away;
    0: not measured."""
    cells: tuple[Measured, ...]


class Service:
    """Coordinators in this process over one pair of workers, for cells that differ in the drafter's distance."""

    def __init__(self, addresses: Sequence[str], cells: Sequence[Measured], timeout_s: float) -> None:
        """``addresses`` are the target's and the drafter's."""
        self._target_address, self._draft_address = addresses
        self._timeout_s = timeout_s
        self._cells = cells
        self._targets: dict[float, TargetClients] = {}
        self._drafts: dict[float, DraftClients] = {}
        self._coordinators: dict[float, Coordinator] = {}
        self._steps: dict[Measured, list[Steps]] = {cell: [] for cell in cells}
        self._rates: dict[Measured, list[float]] = {cell: [] for cell in cells}
        self._num_proposed = dict.fromkeys(cells, 0)

    async def observe(self, prompts: Sequence[str], num_rounds: int) -> InService:
        """All cells in turn, ``num_rounds`` times, the first of them to warm up."""
        try:
            for latency_ms in dict.fromkeys(cell.latency_ms for cell in self._cells):
                await self._connect(latency_ms)
            for index in range(-1, num_rounds):
                for cell in self._cells if index % 2 == 0 else reversed(self._cells):
                    start = index * cell.concurrency
                    batch = [prompts[(start + offset) % len(prompts)] for offset in range(cell.concurrency)]
                    await self._round(cell, batch, counts=index >= 0)
        finally:
            for coordinator in self._coordinators.values():
                await coordinator.close()
        return self._result(num_rounds)

    async def _connect(self, latency_ms: float) -> None:
        cache: TokenizerCache = {}
        target: TargetClients = RecordingClient(grpc_target_client(self._target_address, self._timeout_s, cache))
        draft: DraftClients = RecordingClient(grpc_draft_client(self._draft_address, self._timeout_s, cache))
        delayed = DelayedClient(draft, latency_ms / 1000) if latency_ms else draft
        settings = CoordinatorSettings.model_validate({"targets": target.name})
        coordinator = Coordinator(settings, [target], [delayed])
        self._targets[latency_ms], self._drafts[latency_ms] = target, draft
        self._coordinators[latency_ms] = coordinator
        await coordinator.start()

    async def _round(self, cell: Measured, prompts: Sequence[str], counts: bool) -> None:
        target, draft = self._targets[cell.latency_ms], self._drafts[cell.latency_ms]
        target.frames.clear()
        if not counts:
            draft.frames.clear()
        start_s = time.perf_counter()
        coordinator = self._coordinators[cell.latency_ms]
        await asyncio.gather(*(_generate(coordinator, prompt, cell) for prompt in prompts))
        if counts:
            self._rates[cell].append(len(prompts) * cell.num_tokens / (time.perf_counter() - start_s))
            steps = [(arrived_s, frame.step) for arrived_s, frame in target.frames if frame.step is not None]
            self._steps[cell].append(Steps(steps))
            self._num_proposed[cell] += _num_proposed(draft.frames)
        draft.frames.clear()

    def _result(self, num_rounds: int) -> InService:
        usual = [cell for cell in self._cells if cell.is_usual]
        num_proposed = sum(self._num_proposed[cell] for cell in usual)
        num_tokens = sum(cell.num_tokens for cell in usual) * num_rounds
        return InService(
            self._costs(streams=False),
            self._costs(streams=True),
            num_proposed / num_tokens if usual else 0.0,
            tuple(
                replace(cell, num_runs=num_rounds * cell.concurrency, tokens_per_s=statistics.median(rates))
                for cell, rates in self._rates.items()
            ),
        )

    def _costs(self, streams: bool) -> Costs:
        cells = [cell for cell in self._cells if cell.streams == streams]
        single = [steps for cell in cells for steps in self._steps[cell] if cell.concurrency == 1]
        several = [steps for cell in cells for steps in self._steps[cell] if cell.concurrency > 1]
        return costs_of(single, several)


async def _generate(coordinator: Coordinator, prompt: str, cell: Measured) -> None:
    options = SpeculationOptions(cell.policy is None, cell.policy or "", cell.k or None, turns=cell.system == TURNS)
    request = GenerateRequest(prompt, max_tokens=cell.num_tokens, ignore_eos=True, speculation=options)
    async with aclosing(coordinator.generate(request)) as events:
        async for _ in events:
            pass


def _num_proposed(frames: Sequence[tuple[float, DraftFrame]]) -> int:
    events = (event for _, frame in frames for _, event in frame)
    return sum(len(event.token_ids) for event in events if isinstance(event, Proposal))


def costs_of(single: Sequence[Steps], several: Sequence[Steps]) -> Costs:
    """Costs from runs of one session and runs of several: means by size, brought into order."""
    by_tokens: dict[int, list[float]] = {}
    for _, report in itertools.chain.from_iterable(steps.reports for steps in single):
        by_tokens.setdefault(report.num_tokens, []).append(report.step_s)
    prefill = [(n, seconds) for n, times in by_tokens.items() if n >= _PREFILL_TOKENS for seconds in times]
    points = [
        (n, trimmed_mean(times), len(times))
        for n, times in sorted(by_tokens.items())
        if len(times) >= MIN_SAMPLES and n < _PREFILL_TOKENS
    ]
    if prefill:
        size = round(statistics.mean(n for n, _ in prefill))
        points.append((size, trimmed_mean([s for _, s in prefill]), len(prefill)))
    # Sizes that were seen often pull the others: the least of a dozen small samples would be too little for all.
    rising = list(zip([n for n, _, _ in points], closest_never_falling(points), strict=True))
    alone = Costs(0.0, points=tuple(rising))
    extra = [
        (report.step_s - alone.step_s(report.num_tokens, 1)) / (report.num_sessions - 1)
        for _, report in itertools.chain.from_iterable(steps.reports for steps in several)
        if report.num_sessions > 1 and report.num_tokens < _PREFILL_TOKENS * report.num_sessions
    ]
    session_s = max(0.0, statistics.median(extra)) if extra else 0.0
    between_s = [seconds for steps in single for seconds in steps.between_s()]
    overhead_s = max(0.0, trimmed_mean(between_s))
    return Costs(0.0, 0.0, session_s, overhead_s, tuple((n, seconds - session_s) for n, seconds in rising))


def trimmed_mean(times: Sequence[float]) -> float:
    """Without the fastest and the slowest twentieth, or one each. What interrupts steps is part of their pace, and in
    no median."""
    num_cut = max(len(times) // 20, 1) if len(times) > 2 else 0
    return statistics.fmean(sorted(times)[num_cut : len(times) - num_cut])
