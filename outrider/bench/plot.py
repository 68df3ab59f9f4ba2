"""The cells as a picture. matplotlib is imported only here, and only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from outrider.bench.cells import Cell
from outrider.bench.measure import Condition
from outrider.bench.systems import PLAIN, fixed_k
from outrider.failures import BadUsage

_SIZE_INCHES: Final = (11.0, 8.0)


def check_plotting() -> None:
    """Raises `BadUsage` without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadUsage("--plot needs matplotlib: pip install 'outrider[bench]'") from None


def plot_cells(cells: Sequence[Cell], file: Path) -> None:
    """Single-stream tokens per second by system, and ratios to plain along each axis; quartiles as bars."""
    from matplotlib.figure import Figure as Canvas  # without pyplot: no state, no display

    canvas = Canvas(figsize=_SIZE_INCHES, layout="constrained")
    axes = canvas.subplots(2, 2)
    _bars(axes[0][0], [cell for cell in cells if _is_single(cell.condition)])
    near = [cell for cell in cells if _is_single(cell.condition, concurrency=cell.condition.concurrency)]
    far = [cell for cell in cells if _is_single(cell.condition, latency_ms=cell.condition.one_way_latency_ms)]
    made = [cell for cell in cells if cell.condition.wanted_acceptance is not None]
    _lines(axes[0][1], "requests at a time", near, lambda cell: float(cell.condition.concurrency))
    _lines(axes[1][0], "ms each way to the drafter", far, lambda cell: cell.condition.one_way_latency_ms)
    _lines(axes[1][1], "acceptance (synthetic pairs)", made, lambda cell: cell.condition.wanted_acceptance or 0.0)
    axes[0][1].set_xscale("log", base=2)
    canvas.savefig(file, dpi=120, format="png")


def _is_single(condition: Condition, concurrency: int = 1, latency_ms: float = 0.0) -> bool:
    return condition == Condition(concurrency, condition.temperature, latency_ms)


def _bars(axis: Any, cells: Sequence[Cell]) -> None:
    shown = [cell for cell in cells if fixed_k(cell.system) is None]
    labels = [f"{cell.system}, T {cell.condition.temperature:g}" for cell in shown]
    values = [cell.tokens_per_s.value for cell in shown]
    below = [cell.tokens_per_s.value - cell.tokens_per_s.lower for cell in shown]
    above = [cell.tokens_per_s.upper - cell.tokens_per_s.value for cell in shown]
    axis.barh(range(len(shown)), values, xerr=[below, above])
    axis.set_yticks(range(len(shown)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_title("one request at a time, tokens/s")


def _lines(axis: Any, title: str, cells: Sequence[Cell], at: Callable[[Cell], float]) -> None:
    """One line for each system that was measured at two points or more, at the first cell's temperature."""
    axis.set_title("tokens/s over plain decoding's")
    axis.set_xlabel(title)
    axis.axhline(1.0, color="black", linewidth=0.8)
    for system in dict.fromkeys(cell.system for cell in cells if cell.system != PLAIN):
        found = [
            one for one in cells if one.system == system and one.condition.temperature == cells[0].condition.temperature
        ]
        if len(found) < 2:
            continue
        ratios = [one.ratio_to_plain for one in found]
        spread = [[one.value - one.lower for one in ratios], [one.upper - one.value for one in ratios]]
        dashed = "--" if fixed_k(system) is not None else "-"
        xs, ys = [at(one) for one in found], [one.value for one in ratios]
        axis.errorbar(xs, ys, yerr=spread, label=system, linestyle=dashed, capsize=2)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6)
