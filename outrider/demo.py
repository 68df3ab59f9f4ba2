"""The demonstration: one prompt, speculative and plain through the same server, token for token the same.

Both ways are warmed up first. Then they run in turn, speculative and plain in one pair, and the speedup is the median
of the pairs' ratios, so that a machine whose speed drifts does not favour either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from outrider.client import Client, Completion, Event, Speculation, Tokens, collect

# No newline at the end: the model's tokens hold a line's end and the next one's indentation together.
PROMPT = '''\
import os


def find_files(directory, pattern):
    """Return a list of all files below directory whose name matches pattern."""'''
_WARM_UP_TOKENS = 24

OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Task:
    """What every run generates."""

    prompt: str = PROMPT
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One completion, timed at the client, from the request to the first and to the last token."""

    completion: Completion
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        return len(self.completion.token_ids) / self.total_s


@dataclass(frozen=True, slots=True)
class Comparison:
    """Pairs of runs, speculative and plain."""

    task: Task
    speculative: tuple[Run, ...]
    plain: tuple[Run, ...]

    @property
    def tokens_equal(self) -> bool:
        """Whether all runs, of both kinds, gave the same tokens."""
        return len({run.completion.token_ids for run in (*self.speculative, *self.plain)}) == 1

    @property
    def first_difference(self) -> int | None:
        """Index of the first output token in which a speculative run differs from the first plain one."""
        expected = self.plain[0].completion.token_ids
        for run in (*self.speculative, *self.plain):
            found = run.completion.token_ids
            if found != expected:
                pairs = enumerate(zip(found, expected, strict=False))
                return next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
        return None

    @property
    def speedup(self) -> float:
        """Median over the pairs of plain time / speculative time."""
        pairs = zip(self.speculative, self.plain, strict=True)
        return statistics.median(plain.total_s / fast.total_s for fast, plain in pairs)

    @property
    def acceptance_rate(self) -> float:
        drafted = sum(run.completion.speculation.num_drafted for run in self.speculative)
        return sum(run.completion.speculation.num_accepted for run in self.speculative) / drafted if drafted else 0.0

    @property
    def num_looked_up(self) -> int:
        """Tokens of all speculative runs that the target looked up in the text so far and verified."""
        return sum(run.completion.speculation.num_looked_up for run in self.speculative)

    @property
    def num_looked_up_accepted(self) -> int:
        return sum(run.completion.speculation.num_looked_up_accepted for run in self.speculative)

    @property
    def mean_acceptance_length(self) -> float:
        steps = sum(run.completion.speculation.num_steps for run in self.speculative)
        return sum(len(run.completion.token_ids) for run in self.speculative) / steps if steps else 0.0

    @property
    def mean_k(self) -> float:
        return statistics.fmean(run.completion.speculation.mean_k for run in self.speculative)


async def compare(client: Client, task: Task, repeats: int, show: OnEvent) -> Comparison:
    """Runs ``repeats`` pairs; ``show`` gets the events of the first speculative run as they come."""
    for speculation in (Speculation(), Speculation(disabled=True)):
        await timed_run(client, Task(task.prompt, _WARM_UP_TOKENS, task.temperature, task.seed), speculation)
    speculative: list[Run] = []
    plain: list[Run] = []
    for index in range(repeats):
        speculative.append(await timed_run(client, task, Speculation(), show if index == 0 else _ignore))
        plain.append(await timed_run(client, task, Speculation(disabled=True)))
    return Comparison(task, tuple(speculative), tuple(plain))


async def timed_run(client: Client, task: Task, speculation: Speculation, show: OnEvent | None = None) -> Run:
    """One completion of the task."""
    events: list[Event] = []
    start_s = time.perf_counter()
    first_token_s = 0.0
    stream = client.generate(
        task.prompt,
        max_tokens=task.max_tokens,
        temperature=task.temperature,
        seed=task.seed,
        speculation=speculation,
    )
    async with aclosing(stream):
        async for event in stream:
            if not first_token_s and isinstance(event, Tokens):
                first_token_s = time.perf_counter() - start_s
            events.append(event)
            if show is not None:
                show(event)
    return Run(collect(events), first_token_s, time.perf_counter() - start_s)


def report(comparison: Comparison) -> dict[str, object]:
    """The comparison as one JSON object; times and rates are medians over the runs."""
    fast, plain = comparison.speculative, comparison.plain
    first = fast[0].completion
    return {
        "prompt": comparison.task.prompt,
        "text": first.text,
        "prompt_tokens": first.usage.prompt_tokens,
        "completion_tokens": first.usage.completion_tokens,
        "finish_reason": first.finish_reason,
        "temperature": comparison.task.temperature,
        "seed": first.seed,
        "repeats": len(fast),
        "tokens_equal": comparison.tokens_equal,
        "first_difference": comparison.first_difference,
        "speedup": comparison.speedup,
        "acceptance_rate": comparison.acceptance_rate,
        "num_looked_up": comparison.num_looked_up,
        "num_looked_up_accepted": comparison.num_looked_up_accepted,
        "mean_acceptance_length": comparison.mean_acceptance_length,
        "policy": first.speculation.policy,
        "mean_k": comparison.mean_k,
        "last_k": fast[-1].completion.speculation.last_k,
        "speculative_tokens_per_s": median(run.tokens_per_s for run in fast),
        "plain_tokens_per_s": median(run.tokens_per_s for run in plain),
        "speculative_s": median(run.total_s for run in fast),
        "plain_s": median(run.total_s for run in plain),
        "speculative_first_token_s": median(run.first_token_s for run in fast),
        "plain_first_token_s": median(run.first_token_s for run in plain),
    }


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _ignore(event: Event) -> None:
    """Shows nothing."""
