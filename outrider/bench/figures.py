"""The figures that the project promises, taken from the cells. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from outrider.bench.best_k import NEEDED_SHARE
from outrider.bench.cells import Cell
from outrider.bench.estimates import Estimate
from outrider.bench.machine import Memory
from outrider.bench.measure import Condition
from outrider.bench.systems import (
    NO_DRAFTER,
    OUTRIDER,
    TRANSFORMERS_ASSISTED,
    TRANSFORMERS_PLAIN,
    TURNS,
    WRONG_DRAFTER,
)

Relation = Literal[">=", "<=", "<"]

NEVER_SLOWER: Final = 0.97
BUSY: Final = 32
"""Concurrency at which the coordinator's work is judged."""

_HOLDS: Final[dict[Relation, Callable[[float, float], bool]]] = {
    ">=": lambda value, limit: value >= limit,
    "<=": lambda value, limit: value <= limit,
    "<": lambda value, limit: value < limit,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that must be on the right side of a limit."""

    name: str
    meaning: str
    value: float
    spread: tuple[float, float] | None
    """None: measured once."""
    relation: Relation
    limit: float

    @property
    def needed(self) -> str:
        return f"{self.relation} {self.limit:g}"

    @property
    def holds(self) -> bool:
        return _HOLDS[self.relation](self.value, self.limit)


@dataclass(frozen=True, slots=True)
class _Rule:
    """One figure from the one cell that it is about, one request at a time."""

    name: str
    meaning: str
    system: str
    value: Callable[[Cell], Estimate | None]
    relation: Relation
    limit: float
    greedy: bool = True
    latency_ms: float = 0.0

    def is_about(self, cell: Cell) -> bool:
        condition = cell.condition
        single = Condition(1, condition.temperature, self.latency_ms)
        return cell.system == self.system and condition == single and (condition.temperature == 0) == self.greedy


def _over(system: str) -> Callable[[Cell], Estimate | None]:
    return lambda cell: cell.ratios.get(system)


def _at_both(name: str, meaning: str, value: Callable[[Cell], Estimate | None], limit: float) -> tuple[_Rule, _Rule]:
    return (
        _Rule(name, meaning, OUTRIDER, value, ">=", limit),
        _Rule(f"{name}_sampling", f"{meaning}, sampling", OUTRIDER, value, ">=", limit, greedy=False),
    )


_RULES: Final = (
    *_at_both("speedup", "tokens/s over plain's", lambda cell: cell.ratio_to_plain, 2.5),
    *_at_both("over_turns", "over taking turns", _over(TURNS), 1.25),
    *_at_both("over_assisted", "over transformers assisted", _over(TRANSFORMERS_ASSISTED), 1.4),
    *(
        _Rule(
            f"of_ideal_{ms}ms",
            f"of the ideal, {ms} ms away",
            OUTRIDER,
            lambda cell: cell.ratio_to_ideal,
            ">=",
            limit,
            latency_ms=ms,
        )
        for ms, limit in ((0, 0.85), (5, 0.75), (20, 0.6))
    ),
    _Rule("acceptance_rate", "of drafted tokens verified", OUTRIDER, lambda cell: cell.acceptance_rate, ">=", 0.70),
    _Rule("ttft_ratio", "first token over plain's", OUTRIDER, lambda cell: cell.ttft_ratio_to_plain, "<=", 1.10),
    _Rule(
        "plain_vs_transformers",
        "plain over transformers",
        TRANSFORMERS_PLAIN,
        lambda cell: cell.ratio_to_plain.inverse(),
        ">=",
        0.95,
    ),
    _Rule(
        "wrong_drafter_ratio", "always wrong, over plain", WRONG_DRAFTER, lambda cell: cell.ratio_to_plain, ">=", 0.95
    ),
    _Rule("no_drafter_ratio", "no drafter, over plain", NO_DRAFTER, lambda cell: cell.ratio_to_plain, ">=", 0.95),
)


def figures_of(cells: Sequence[Cell], memory: Memory | None) -> list[Figure]:
    """Every figure that was measured."""
    return [
        *_single(cells),
        *_forward(cells),
        *_worst(cells),
        *_best_k(cells),
        *_coordinator(cells),
        *_frames(cells),
        *_memory(memory),
    ]


def _single(cells: Sequence[Cell]) -> Iterator[Figure]:
    for rule in _RULES:
        found = (rule.value(cell) for cell in cells if rule.is_about(cell))
        value = next((one for one in found if one is not None), None)
        if value is not None:
            yield Figure(rule.name, rule.meaning, value.value, value.spread, rule.relation, rule.limit)


def _forward(cells: Iterable[Cell]) -> Iterator[Figure]:
    """Of the first cell that has bare steps beside it."""
    bare = next((cell.bare for cell in cells if cell.bare is not None), None)
    if bare is not None:
        ratio = bare.eager_s / bare.plain_s
        yield Figure(
            "forward_over_eager", "a bare plain step of transformers' layers, over one of ours", ratio, None, ">=", 1.5
        )


def _worst(cells: Sequence[Cell]) -> Iterator[Figure]:
    """The slowest cell along each axis, over plain decoding."""
    mine = [cell for cell in cells if cell.system == OUTRIDER]
    axes = (
        ("concurrency", [cell for cell in mine if not _is_far(cell) and cell.condition.wanted_acceptance is None]),
        ("acceptance", [cell for cell in mine if cell.condition.wanted_acceptance is not None]),
        ("latency", [cell for cell in mine if _is_far(cell)]),
    )
    for axis, found in axes:
        if found:
            cell = min(found, key=lambda one: one.ratio_to_plain.value)
            ratio, where = cell.ratio_to_plain, described(cell.condition)
            meaning = f"over plain, worst {axis}: {where}"
            yield Figure(f"worst_{axis}", meaning, ratio.value, ratio.spread, ">=", NEVER_SLOWER)


def _best_k(cells: Sequence[Cell]) -> Iterator[Figure]:
    found = [(cell.best_k, cell) for cell in cells if cell.best_k is not None]
    if found:
        best, cell = min(found, key=lambda one: one[0].share.value)
        meaning = f"over the best fixed K, worst: {best.name}, {described(cell.condition)}"
        yield Figure("over_best_k", meaning, best.share.value, best.share.spread, ">=", NEEDED_SHARE)


def _coordinator(cells: Iterable[Cell]) -> Iterator[Figure]:
    for cell in cells:
        cost = cell.coordinator_us_per_token
        if cell.system == OUTRIDER and cell.condition.concurrency == BUSY and cost is not None:
            meaning = f"coordinator, µs per token, {BUSY} at a time"
            yield Figure("coordinator_us_per_token", meaning, cost.value, cost.spread, "<=", 100)


def _frames(cells: Iterable[Cell]) -> Iterator[Figure]:
    mine = [(cell.frames_per_step, cell) for cell in cells if cell.system == OUTRIDER]
    known = [(frames, cell) for frames, cell in mine if frames is not None]
    for way, direction in enumerate(("to", "from")):
        if known:
            frames, cell = max(known, key=lambda one: one[0][way])
            meaning = f"frames {direction} the target per step, worst: {described(cell.condition)}"
            yield Figure(f"frames_{direction}_target", meaning, frames[way], None, "<=", 1)


def _memory(memory: Memory | None) -> Iterator[Figure]:
    if memory is not None:
        yield Figure("memory_ratio", "over target + coordinator", memory.ratio, None, "<", 2.0)


def _is_far(cell: Cell) -> bool:
    return cell.condition.one_way_latency_ms > 0


def described(condition: Condition) -> str:
    """A condition in a few words."""
    parts = [f"temperature {condition.temperature:g}"]
    if condition.concurrency > 1:
        parts.append(f"{condition.concurrency} at a time")
    if condition.one_way_latency_ms:
        parts.append(f"{condition.one_way_latency_ms:g} ms away")
    if condition.wanted_acceptance is not None:
        parts.append(f"made for acceptance {condition.wanted_acceptance:g}")
    return ", ".join(parts)
