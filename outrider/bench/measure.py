"""Running systems in turn, so that each is compared only with what ran right beside it.

A round is one batch of tasks given to one system, all at a time. Every system gets the same batch before the next one
begins, in an order that is turned round each time, and only one system works at a time: a machine whose speed drifts
favours none.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from outrider.bench.coordinator_work import CoordinatorWork, WorkMeter, no_meter
from outrider.bench.ideal import BareSteps, Ideal
from outrider.bench.systems import OUTRIDER, PLAIN, TRANSFORMERS, Run, System, Task

ItemT = TypeVar("ItemT")

_WARM_UP_ROUNDS: Final = 2
_WARM_UP_SEEDS: Final = 500_000
_FEW_TOKENS: Final = 8

BareClock = Callable[[], Awaitable[BareSteps]]

MIN_BATCHES: Final = 6
"""Batches under one condition with several requests at a time: a median of fewer pairs says little."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What all rounds of a block have in common."""

    concurrency: int
    temperature: float
    one_way_latency_ms: float = 0.0
    """Between the drafter and the coordinator, which stands beside the target."""
    wanted_acceptance: float | None = None
    """What the synthetic pair was made for; None: the pair itself."""


@dataclass(frozen=True, slots=True)
class Round:
    """The runs of one batch, in the order of its tasks."""

    tasks: tuple[Task, ...]
    runs: tuple[Run, ...]
    coordinator_work: CoordinatorWork | None = None
    """What the coordinator did meanwhile; None if it cannot be told, or served nothing."""
    bare: BareSteps | None = None
    """Timed right before and after; None: not here."""

    @property
    def num_tokens(self) -> int:
        return sum(len(run.token_ids) for run in self.runs)

    @property
    def tokens_per_s(self) -> float:
        """From the requests to the last token of all."""
        return self.num_tokens / max(run.total_s for run in self.runs)

    @property
    def num_steps(self) -> int:
        """Verify steps of all runs, each run's counted; 0 where nothing is known of them."""
        return sum(run.speculation.num_steps for run in self.runs if run.speculation is not None)

    @property
    def decode_s(self) -> float:
        """From the first token of any to the last of all."""
        return max(run.total_s for run in self.runs) - min(run.first_token_s for run in self.runs)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """After the first tokens; None if all came at once."""
        num_later = self.num_tokens - sum(run.num_first_tokens for run in self.runs)
        return num_later / self.decode_s if num_later and self.decode_s > 0 else None


@dataclass(frozen=True, slots=True)
class Difference:
    """A completion whose tokens are not those of plain decoding."""

    system: str
    task: Task
    position: int
    """Index of the first output token that differs."""

    def __str__(self) -> str:
        start = self.task.prompt[:40]
        return (
            f"{self.system}: its tokens for prompt {self.task.prompt_index} ({start!r}...) at temperature "
            f"{self.task.temperature:g}, seed {self.task.seed}, differ from plain decoding's from output token "
            f"{self.position} on"
        )


@dataclass(frozen=True, slots=True)
class Block:
    """All rounds under one condition; the i-th rounds of all systems belong together."""

    condition: Condition
    rounds: Mapping[str, Sequence[Round]]
    """By system; plain is always among them."""
    differences: tuple[Difference, ...]
    compared: frozenset[str]
    """Systems whose tokens were compared with plain's."""
    ideal: Ideal | None = None
    """None: not measured here."""


class Observer:
    """Told of what happens; does nothing with it."""

    def stage(self, text: str) -> None:
        """Something is being prepared."""

    def begins(self, system: str, condition: Condition) -> None:
        """A round, warm-up included, begins."""

    def ends(self) -> None:
        """A round, warm-up included, has ended."""

    def differs(self, difference: Difference) -> None:
        """Tokens that had to be equal are not."""


def batches(
    prompts: Sequence[str], condition: Condition, num_prompts: int, max_tokens: int, repeats: int
) -> list[tuple[Task, ...]]:
    """Batches of ``concurrency`` tasks that go through ``num_prompts`` prompts ``repeats`` times, each time with other
    seeds. A last batch that would be too small is filled up with further prompts, in the end from the first again."""

    def task(repeat: int, slot: int) -> Task:
        index = slot % len(prompts)
        return Task(index, prompts[index], max_tokens, condition.temperature, seed=1000 * repeat + slot)

    size = condition.concurrency
    starts = range(0, min(num_prompts, len(prompts)), size)
    return [
        tuple(task(repeat, start + offset) for offset in range(size)) for repeat in range(repeats) for start in starts
    ]


def in_turn(items: Sequence[ItemT], index: int) -> list[ItemT]:
    """Forwards in even rounds, backwards in odd ones."""
    return list(items) if index % 2 == 0 else list(reversed(items))


def first_difference(found: Sequence[int], expected: Sequence[int]) -> int | None:
    """Index of the first item that differs; None if the two are equal."""
    if tuple(found) == tuple(expected):
        return None
    pairs = enumerate(zip(found, expected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))


def compare(system: str, found: Round, plain: Round) -> list[Difference]:
    """The tasks of a round that did not end as plain decoding did."""
    differences = []
    for task, run, expected in zip(found.tasks, found.runs, plain.runs, strict=True):
        position = first_difference(run.token_ids, expected.token_ids)
        if position is not None:
            differences.append(Difference(system, task, position))
    return differences


def repeats_for(concurrency: int, num_prompts: int, repeats: int) -> int:
    """Repetitions that make at least `MIN_BATCHES` batches, if more than ``repeats``."""
    batches_each = -(-num_prompts // concurrency)
    return max(repeats, -(-MIN_BATCHES // batches_each)) if concurrency > 1 else repeats


def num_rounds(num_systems: int, num_batches: int) -> int:
    """Rounds that `measure` will run, warm-up included."""
    return num_systems * (num_batches + _WARM_UP_ROUNDS)


async def measure(
    systems: Sequence[System],
    condition: Condition,
    work: Sequence[tuple[Task, ...]],
    observer: Observer,
    meter: WorkMeter = no_meter,
    time_bare: BareClock | None = None,
) -> Block:
    """Warms every system up, then runs all batches. ``systems`` holds plain; put it where all others are near it.

    Tokens are compared with plain's as it goes; a difference is told to the observer at once and ends nothing.
    ``time_bare`` times the target's bare steps beside each round of ours, as the machine drifts; ``meter`` tells what
    the coordinator has done so far.
    """
    for batch in itertools.islice(itertools.cycle(work), _WARM_UP_ROUNDS):
        for system in systems:
            tasks = [_warm_up(task, system.name) for task in batch]
            await _round([system], tasks, condition, observer, meter)
    rounds: dict[str, list[Round]] = {system.name: [] for system in systems}
    compared = [s for s in systems if s.name != PLAIN and s.must_equal_plain(condition.temperature)]
    differences: list[Difference] = []
    for index, batch in enumerate(work):
        results = await _round(in_turn(systems, index), batch, condition, observer, meter, time_bare)
        for system in compared:
            found = compare(system.name, results[system.name], results[PLAIN])
            for difference in found:
                observer.differs(difference)
            differences += found
        for name, result in results.items():
            rounds[name].append(result)
    return Block(condition, rounds, tuple(differences), frozenset(system.name for system in compared))


def _warm_up(task: Task, system: str) -> Task:
    """Half the task, with a seed that is not measured; less for a system that learns nothing."""
    num_tokens = max(2, task.max_tokens // 2)
    if system in TRANSFORMERS:
        num_tokens = min(num_tokens, _FEW_TOKENS)
    return replace(task, max_tokens=num_tokens, seed=task.seed + _WARM_UP_SEEDS)


async def _round(
    systems: Sequence[System],
    tasks: Sequence[Task],
    condition: Condition,
    observer: Observer,
    meter: WorkMeter,
    time_bare: BareClock | None = None,
) -> dict[str, Round]:
    """The same batch for each system, one system after the other."""
    results: dict[str, Round] = {}
    for system in systems:
        clock = time_bare if system.name == OUTRIDER else None
        observer.begins(system.name, condition)
        bare = []
        if clock is not None:
            bare.append(await clock())
            await _together(system, [_to_settle(task) for task in tasks])
        before = await meter()
        runs = await _together(system, tasks)
        after = await meter()
        work = after.since(before) if before is not None and after is not None else None
        served = work is not None and work.num_target_steps > 0
        bare += [await clock()] if clock is not None else []
        steps = BareSteps.median_of(bare) if bare else None
        results[system.name] = Round(tuple(tasks), runs, work if served else None, steps)
        observer.ends()
    return results


def _to_settle(task: Task) -> Task:
    """A few tokens that nobody measures: right after another process has had the caches and the cores, the first token
    came 8 % later, of plain decoding as well."""
    return replace(task, max_tokens=min(task.max_tokens, _FEW_TOKENS), seed=task.seed + _WARM_UP_SEEDS)


async def _together(system: System, tasks: Sequence[Task]) -> tuple[Run, ...]:
    """All tasks at a time; the first failure cancels the others and is raised alone."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(system.run(task)) for task in tasks]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return tuple(task.result() for task in running)
