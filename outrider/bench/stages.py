"""What runs together: one deployment, and the systems compared on it.

A stage starts its processes, measures, and ends them before the next begins, so that no measurement shares the machine
with a deployment that it does not need.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from outrider.bench.cells import Cell, cells_of
from outrider.bench.machine import Memory, memory_of, num_cores
from outrider.bench.measure import Condition, Difference, Observer, batches, measure, num_rounds
from outrider.bench.settings import BenchSettings
from outrider.bench.systems import (
    NO_DRAFTER,
    OUTRIDER,
    PLAIN,
    TRANSFORMERS_PLAIN,
    WRONG_DRAFTER,
    System,
    Task,
    plain_system,
    speculative_system,
)
from outrider.bench.transformers_system import TransformersOptions, TransformersSystem, start_module
from outrider.client import Client
from outrider.failures import BadUsage, CommandFailed
from outrider.launcher import LocalStack, StackOptions, share_of_cores

HELD_OUT_PROMPTS: Final = Path(__file__).resolve().parents[2] / "models" / "heldout_prompts.json"

_PAIR: Final = "the pair"
_WRONG: Final = "a drafter that is always wrong"
_NONE: Final = "no drafter"
_STAGES: Final = (
    (_PAIR, (OUTRIDER, PLAIN, TRANSFORMERS_PLAIN)),
    (_WRONG, (WRONG_DRAFTER, PLAIN)),
    (_NONE, (NO_DRAFTER, PLAIN)),
)
"""Plain is the reference of every stage, and stands in the middle so that each other system runs right beside it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One deployment and what is measured on it."""

    title: str
    systems: tuple[str, ...]

    def running(self, condition: Condition) -> tuple[str, ...]:
        """Its systems under this condition: transformers answers one request at a time."""
        return tuple(name for name in self.systems if condition.concurrency == 1 or name != TRANSFORMERS_PLAIN)

    @property
    def reports_plain(self) -> bool:
        """Plain decoding is measured in every stage, and is a cell of its own only on the pair itself."""
        return self.title == _PAIR


@dataclass(frozen=True, slots=True)
class Results:
    """Everything measured."""

    cells: tuple[Cell, ...]
    memory: Memory | None
    """Of the pair's processes after its cells; None if they were not measured."""
    differences: tuple[Difference, ...]


def stages_for(wanted: Sequence[str]) -> list[Stage]:
    """The stages that measure the systems wanted, each with plain decoding."""
    stages = []
    for title, systems in _STAGES:
        chosen = tuple(name for name in systems if name in wanted or name == PLAIN)
        if len(chosen) > 1 or (title == _PAIR and PLAIN in wanted):
            stages.append(Stage(title, chosen))
    return stages


def conditions(settings: BenchSettings) -> list[Condition]:
    """Every temperature at every concurrency."""
    return [
        Condition(concurrency, temperature)
        for temperature in settings.temperature_list
        for concurrency in settings.concurrency_list
    ]


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

    @property
    def num_rounds(self) -> int:
        """Rounds of all stages, warm-up included."""
        return sum(
            num_rounds(len(stage.running(condition)), len(self._batches(condition)))
            for stage in stages_for(self._settings.system_list)
            for condition in conditions(self._settings)
        )

    async def run(self) -> Results:
        """Measures everything, stage by stage. Raises `CommandFailed` and the errors of `rpc.errors`."""
        cells: list[Cell] = []
        differences: list[Difference] = []
        memory: Memory | None = None
        for stage in stages_for(self._settings.system_list):
            async with self._deployment(stage) as (stack, systems):
                for condition in conditions(self._settings):
                    running = [system for system in systems if system.name in stage.running(condition)]
                    block = await measure(running, condition, self._batches(condition), self._observer)
                    cells += (cell for cell in cells_of(block) if cell.system != PLAIN or stage.reports_plain)
                    differences += block.differences
                if OUTRIDER in stage.systems:
                    memory = memory_of(stack.pids)
        return Results(tuple(cells), memory, tuple(differences))

    def _batches(self, condition: Condition) -> list[tuple[Task, ...]]:
        settings = self._settings
        return batches(self._prompts, condition, settings.num_prompts, settings.num_tokens, settings.num_repeats)

    @asynccontextmanager
    async def _deployment(self, stage: Stage) -> AsyncIterator[tuple[LocalStack, list[System]]]:
        """The processes of a stage, up and ready."""
        async with AsyncExitStack() as life:
            draft = await self._draft(stage, life)
            self._observer.stage(f"starting {stage.title}")
            stack = await life.enter_async_context(LocalStack(replace(self._options, draft=draft)))
            client = await life.enter_async_context(Client(stack.address))
            systems: list[System] = []
            for name in stage.systems:
                if name == TRANSFORMERS_PLAIN:
                    self._observer.stage("starting transformers")
                    options = transformers_options(self._options)
                    systems.append(await life.enter_async_context(TransformersSystem(options)))
                else:
                    systems.append(plain_system(client) if name == PLAIN else speculative_system(name, client))
            yield stack, systems

    async def _draft(self, stage: Stage, life: AsyncExitStack) -> str | None:
        """The draft model of a stage."""
        if stage.title == _NONE:
            return None
        assert self._options.draft is not None
        if stage.title == _PAIR:
            return self._options.draft
        self._observer.stage("making a drafter that is always wrong")
        folder = life.enter_context(tempfile.TemporaryDirectory(prefix="outrider-bench-"))
        await make_wrong_drafter(self._options.draft, folder)
        return folder


def transformers_options(options: StackOptions) -> TransformersOptions:
    """The same weights, dtype, device and threads as the pair's target worker."""
    return TransformersOptions(options.target, target_threads(options), options.device, options.dtype)


def target_threads(options: StackOptions) -> int:
    """CPU threads of the target worker when there is a drafter."""
    return options.target_threads or share_of_cores(num_cores(), drafting=True)[0]


async def make_wrong_drafter(source: str, folder: str) -> None:
    """Writes the model into ``folder``, in a process of its own that takes torch with it. Raises `CommandFailed`."""
    process = await start_module("outrider.bench.wrong_drafter", source, folder)
    try:
        await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise CommandFailed(f"no drafter could be made in the shape of {source}; the messages are above")
