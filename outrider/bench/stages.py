"""Brings up what runs together, and measures: one deployment after the other.

A stage starts its processes, measures, and ends them before the next begins, so that no measurement shares the machine
with a deployment that it does not need.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from coordinator.settings import CoordinatorSettings
from outrider.bench.bare_pair import BarePair
from outrider.bench.cells import Cell, cells_of
from outrider.bench.coordinator_work import CoordinatorWork
from outrider.bench.json_process import run_module
from outrider.bench.machine import Memory, cpu_seconds_of, memory_of, num_cores
from outrider.bench.measure import Block, Condition, Difference, Observer, batches, measure, num_rounds, repeats_for
from outrider.bench.plan import NONE, PAIR, SYNTHETIC, WRONG, Measurement, Stage, stages_for
from outrider.bench.settings import BenchSettings
from outrider.bench.systems import OUTRIDER, PLAIN, TRANSFORMERS, System, Task, served_system
from outrider.bench.transformers_system import TransformersOptions, TransformersProcess, TransformersSystem
from outrider.client import Client
from outrider.failures import BadUsage
from outrider.launcher import COORDINATOR, LocalStack, StackOptions, share_of_cores

HELD_OUT_PROMPTS: Final = Path(__file__).resolve().parents[2] / "models" / "heldout_prompts.json"


@dataclass(frozen=True, slots=True)
class Results:
    """Everything measured."""

    cells: tuple[Cell, ...]
    memory: Memory | None
    """Of the pair's processes after its cells; None if they were not measured."""
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class _Deployed:
    """A stage's processes, up and ready."""

    stack: LocalStack
    client: Client
    systems: dict[str, System]
    bare: BarePair | None

    async def coordinator_work(self) -> CoordinatorWork | None:
        cpu_s = cpu_seconds_of(self.stack.pids[COORDINATOR])
        if cpu_s is None:
            return None
        traffic = (await self.client.model()).traffic
        frames = traffic.num_frames_to_targets, traffic.num_frames_from_targets
        return CoordinatorWork(cpu_s, traffic.num_target_steps, *frames)


def read_prompts(path: Path | None) -> list[str]:
    """The texts to complete. Raises `BadUsage`."""
    file = path or HELD_OUT_PROMPTS
    try:
        prompts = json.loads(file.read_text(encoding="utf-8"))["prompts"]
    except OSError as error:
        raise BadUsage(f"prompts {file}: {error.strerror}; name a file with --prompt-file") from None
    except (ValueError, KeyError, TypeError):
        prompts = None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) and text for text in prompts):
        raise BadUsage(f'prompts {file}: has to be a JSON object with a list "prompts" of texts')
    return prompts


class Bench:
    """One run of the benchmark on one pair."""

    def __init__(self, settings: BenchSettings, options: StackOptions, observer: Observer) -> None:
        self._settings = settings
        self._options = options
        self._observer = observer
        self._prompts = read_prompts(settings.prompt_file)
        self._stages = stages_for(settings)

    @property
    def num_rounds(self) -> int:
        """Rounds of all stages, warm-up included."""
        return sum(
            num_rounds(len(one.systems), len(self._batches(one)))
            for stage in self._stages
            for one in stage.measurements
        )

    async def run(self) -> Results:
        """Measures everything, stage by stage. Raises `CommandFailed` and the errors of `rpc.errors`."""
        cells: list[Cell] = []
        differences: list[Difference] = []
        memory: Memory | None = None
        with tempfile.TemporaryDirectory(prefix="outrider-bench-") as folder:
            await self._slow_down(Path(folder))
            await self._make_models(Path(folder))
            for stage in self._stages:
                async with self._deployment(stage, Path(folder)) as deployed:
                    for one in stage.measurements:
                        block = await self._measure(one, deployed)
                        cells += (cell for cell in cells_of(block) if cell.system != PLAIN or stage.reports_plain)
                        differences += block.differences
                    if stage.title == PAIR and OUTRIDER in stage.systems and memory is None:
                        memory = memory_of(deployed.stack.pids)
        return Results(tuple(cells), memory, tuple(differences))

    async def _measure(self, one: Measurement, deployed: _Deployed) -> Block:
        running, work = [deployed.systems[name] for name in one.systems], self._batches(one)
        bare = deployed.bare if one.condition.concurrency == 1 else None
        clock = None if bare is None else bare.time_steps
        block = await measure(running, one.condition, work, self._observer, deployed.coordinator_work, clock)
        return block if bare is None else replace(block, ideal=await bare.ideal(one.condition.temperature))

    def _batches(self, one: Measurement) -> list[tuple[Task, ...]]:
        settings, condition = self._settings, one.condition
        repeats = repeats_for(condition.concurrency, min(settings.num_prompts, len(self._prompts)), one.repeats)
        short = condition.concurrency > 1 or condition.wanted_acceptance is not None
        max_tokens = max(2, settings.num_tokens // 2) if short else settings.num_tokens
        return batches(self._prompts, condition, settings.num_prompts, max_tokens, repeats)

    @asynccontextmanager
    async def _deployment(self, stage: Stage, folder: Path) -> AsyncIterator[_Deployed]:
        options = stage_options(self._options, stage, folder)
        async with AsyncExitStack() as life:
            self._observer.stage(f"starting {_described(stage.title, stage.condition)}")
            stack = await life.enter_async_context(LocalStack(options))
            client = await life.enter_async_context(Client(stack.address))
            systems: dict[str, System] = {
                name: served_system(name, client) for name in stage.systems if name not in TRANSFORMERS
            }
            try:
                async with asyncio.TaskGroup() as starting:
                    theirs = starting.create_task(self._transformers(stage, options, life))
                    bare = starting.create_task(self._bare_pair(stage, options, life))
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
            yield _Deployed(stack, client, systems | theirs.result(), bare.result())

    async def _transformers(self, stage: Stage, options: StackOptions, life: AsyncExitStack) -> dict[str, System]:
        names = [name for name in stage.systems if name in TRANSFORMERS]
        if not names:
            return {}
        self._observer.stage("starting transformers")
        process = await life.enter_async_context(TransformersProcess(transformers_options(options)))
        return {name: TransformersSystem(name, process) for name in names}

    async def _bare_pair(self, stage: Stage, options: StackOptions, life: AsyncExitStack) -> BarePair | None:
        single = any(one.condition.concurrency == 1 for one in stage.measurements)
        if not (self._settings.ideal and single and stage.title == PAIR and OUTRIDER in stage.systems):
            return None
        self._observer.stage("measuring the pair without anything around it")
        prompts = self._prompts[: self._settings.num_prompts]
        k = options.max_k or CoordinatorSettings.model_fields["max_k"].default
        bare = BarePair(options, target_threads(options), k, prompts, self._settings.num_tokens)
        return await life.enter_async_context(bare)

    async def _slow_down(self, folder: Path) -> None:
        times = self._settings.slow_target
        if times > 1:
            self._observer.stage(f"making the target {times} times as slow")
            slower = str(folder / "slower")
            await run_module("outrider.bench.slower_target", self._options.target, slower, str(times))
            self._options = replace(self._options, target=slower)

    async def _make_models(self, folder: Path) -> None:
        """What the stages need besides the pair, each made by a process of its own that takes torch with it."""
        draft, titles = self._options.draft, {stage.title for stage in self._stages}
        if WRONG in titles:
            self._observer.stage("making a drafter that is always wrong")
            assert draft is not None
            await run_module("outrider.bench.wrong_drafter", draft, str(folder / "wrong"))
        if SYNTHETIC in titles:
            self._observer.stage("making synthetic pairs")
            acceptances = [f"{rate:g}" for rate in self._settings.acceptance_list]
            temperature = str(self._settings.temperature_list[-1])
            await run_module(
                "outrider.bench.synthetic_pair", self._options.target, str(folder), temperature, *acceptances
            )


def stage_options(options: StackOptions, stage: Stage, folder: Path) -> StackOptions:
    """The deployment of a stage; ``folder`` holds the models that were made."""
    if stage.title == NONE:
        return replace(options, draft=None)
    if stage.title == WRONG:
        return replace(options, draft=str(folder / "wrong"))
    if stage.title == SYNTHETIC:
        target = folder / f"target-{stage.condition.wanted_acceptance:g}"
        return replace(options, target=str(target), draft=str(folder / "draft"))
    return replace(options, draft_latency_ms=stage.condition.one_way_latency_ms)


def transformers_options(options: StackOptions) -> TransformersOptions:
    """The same weights, dtype, device and threads as the pair's target worker."""
    threads = target_threads(options)
    return TransformersOptions(options.target, threads, options.device, options.dtype, options.draft or "")


def target_threads(options: StackOptions) -> int:
    """CPU threads of the target worker when there is a drafter."""
    return options.target_threads or share_of_cores(num_cores(), drafting=True)[0]


def _described(title: str, condition: Condition) -> str:
    if condition.wanted_acceptance is not None:
        return f"{title} with acceptance {condition.wanted_acceptance:g}"
    return f"{title}, {condition.one_way_latency_ms:g} ms away" if condition.one_way_latency_ms else title
