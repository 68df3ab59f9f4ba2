"""The figures that the project promises, taken from greedy single-stream cells. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from outrider.bench.cells import Cell
from outrider.bench.estimates import Estimate
from outrider.bench.machine import Memory
from outrider.bench.systems import NO_DRAFTER, OUTRIDER, TRANSFORMERS_PLAIN, WRONG_DRAFTER

Relation = Literal[">=", "<=", "<"]

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
class _FromCell:
    name: str
    meaning: str
    system: str
    value: Callable[[Cell], Estimate | None]
    relation: Relation
    limit: float


_FROM_CELLS: Final = (
    _FromCell(
        "acceptance_rate",
        "of drafted tokens verified",
        OUTRIDER,
        lambda cell: cell.acceptance_rate,
        ">=",
        0.70,
    ),
    _FromCell("speedup", "tokens/s over plain's", OUTRIDER, lambda cell: cell.ratio_to_plain, ">=", 2.0),
    _FromCell("ttft_ratio", "first token over plain's", OUTRIDER, lambda cell: cell.ttft_ratio_to_plain, "<=", 1.10),
    _FromCell(
        "plain_vs_transformers",
        "plain over transformers",
        TRANSFORMERS_PLAIN,
        lambda cell: cell.ratio_to_plain.inverse(),
        ">=",
        0.95,
    ),
    _FromCell(
        "wrong_drafter_ratio",
        "always wrong, over plain",
        WRONG_DRAFTER,
        lambda cell: cell.ratio_to_plain,
        ">=",
        0.95,
    ),
    _FromCell("no_drafter_ratio", "no drafter, over plain", NO_DRAFTER, lambda cell: cell.ratio_to_plain, ">=", 0.95),
)


def figures_of(cells: Sequence[Cell], memory: Memory | None) -> list[Figure]:
    """Every figure that was measured."""
    figures = [figure for rule in _FROM_CELLS if (figure := _from_cells(rule, cells)) is not None]
    if memory is not None:
        meaning = "over target + coordinator"
        figures.append(Figure("memory_ratio", meaning, memory.ratio, None, "<", 2.0))
    return figures


def _from_cells(rule: _FromCell, cells: Sequence[Cell]) -> Figure | None:
    for cell in cells:
        if cell.system == rule.system and _single_greedy(cell) and (value := rule.value(cell)) is not None:
            return Figure(rule.name, rule.meaning, value.value, value.spread, rule.relation, rule.limit)
    return None


def _single_greedy(cell: Cell) -> bool:
    condition = cell.condition
    return (condition.concurrency, condition.temperature, condition.one_way_latency_ms) == (1, 0, 0)
