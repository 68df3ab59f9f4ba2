"""The results as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Final

from rich import box
from rich.table import Table

from outrider.bench.best_k import NEEDED_SHARE, BestK
from outrider.bench.cells import Cell
from outrider.bench.estimates import Estimate
from outrider.bench.figures import Figure, described, figures_of
from outrider.bench.machine import Memory
from outrider.bench.measure import Condition
from outrider.bench.stages import Results
from outrider.bench.systems import PLAIN, SYSTEMS

_WAYS: Final = ("to_target", "from_target")
_SYSTEM_WIDTH: Final = max(map(len, SYSTEMS))
_CELL_COLUMNS: Final = (
    "tokens\n/s",
    "ratio to\nplain",
    "TTFT\nms",
    "TTFT\nratio",
    "accept\nrate",
    "per\nstep",
)


def report(
    results: Results, machine: dict[str, object], pair: dict[str, object], settings: dict[str, object], command: str
) -> dict[str, object]:
    """The whole run as one JSON object; medians with ``spread``, their first and third quartile."""
    memory = results.memory
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine,
        "pair": pair,
        "settings": settings,
        "cells": [cell_object(cell) for cell in results.cells],
        "figures": {figure.name: figure_object(figure) for figure in figures_of(results.cells, memory)},
        "memory_bytes": None if memory is None else dict(memory.resident_bytes),
        "differences": [str(difference) for difference in results.differences],
    }


def cell_object(cell: Cell) -> dict[str, object]:
    """One element of ``cells``."""
    return {
        "system": cell.system,
        "concurrency": cell.condition.concurrency,
        "one_way_latency_ms": cell.condition.one_way_latency_ms,
        "temperature": cell.condition.temperature,
        "acceptance_rate": _value(cell.acceptance_rate),
        "mean_acceptance_length": cell.mean_acceptance_length,
        "mean_k": cell.mean_k,
        "speculation_counts": None if cell.speculation_counts is None else dict(cell.speculation_counts),
        "tokens_per_s": cell.tokens_per_s.value,
        "spread": list(cell.tokens_per_s.spread),
        "decode_tokens_per_s": _value(cell.decode_tokens_per_s),
        "plain_tokens_per_s": cell.plain_tokens_per_s,
        "ratio_to_plain": cell.ratio_to_plain.value,
        "ratio_spread": list(cell.ratio_to_plain.spread),
        "decode_ratio_to_plain": _value(cell.decode_ratio_to_plain),
        "ttft_ms": cell.ttft_ms.value,
        "ttft_spread_ms": list(cell.ttft_ms.spread),
        "ttft_ratio_to_plain": cell.ttft_ratio_to_plain.value,
        "ttft_ratio_spread": list(cell.ttft_ratio_to_plain.spread),
        "tokens_equal": cell.tokens_equal,
        "wanted_acceptance": cell.condition.wanted_acceptance,
        "ratios": {name: {"value": ratio.value, "spread": list(ratio.spread)} for name, ratio in cell.ratios.items()},
        "best_fixed_k": None if cell.best_k is None else _best_k_object(cell.best_k),
        "drafted_per_committed": cell.drafted_per_committed,
        "caught_share": cell.caught_share,
        "coordinator_us_per_token": _value(cell.coordinator_us_per_token),
        "frames_per_step": cell.frames_per_step and dict(zip(_WAYS, cell.frames_per_step, strict=True)),
        **_ideal_object(cell),
        "num_runs": cell.num_runs,
    }


def _best_k_object(best: BestK) -> dict[str, object]:
    return {
        "system": best.name,
        "share": best.share.value,
        "spread": list(best.share.spread),
        "standard_error": best.error,
        "paces": best.paces and [asdict(pace) for pace in best.paces],
    }


def _ideal_object(cell: Cell) -> dict[str, object]:
    ideal, bare, ratio = cell.ideal, cell.bare, cell.ratio_to_ideal
    if ideal is None or bare is None or ratio is None:
        return {}
    return {
        "ideal_tokens_per_s": ideal.tokens_per_s(bare),
        "ratio_to_ideal": ratio.value,
        "ratio_to_ideal_spread": list(ratio.spread),
        "ideal": {
            "k": ideal.k,
            "mean_acceptance_length": ideal.mean_acceptance_length,
            "bare_plain_step_s": bare.plain_s,
            "bare_verify_step_s": bare.verify_s,
            "bare_eager_step_s": bare.eager_s,
        },
    }


def figure_object(figure: Figure) -> dict[str, object]:
    """One element of ``figures``."""
    return {
        "value": figure.value,
        "spread": None if figure.spread is None else list(figure.spread),
        "needed": figure.needed,
        "holds": figure.holds,
    }


def cells_tables(cells: Sequence[Cell]) -> list[Table]:
    """One table for each condition, one row for each of its cells; 80 columns wide."""
    groups: dict[Condition, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.condition, []).append(cell)
    return [_cells_table(condition, group) for condition, group in groups.items()]


def _cells_table(condition: Condition, cells: Sequence[Cell]) -> Table:
    table = _table(f"{described(condition)}: medians; in brackets the quartiles over pairs of runs")
    table.add_column("system", no_wrap=True, min_width=_SYSTEM_WIDTH)
    for name in _CELL_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        table.add_row(
            cell.system,
            f"{cell.tokens_per_s.value:.0f}",
            _with_spread(cell.ratio_to_plain),
            f"{cell.ttft_ms.value:.0f}",
            f"{cell.ttft_ratio_to_plain.value:.2f}",
            "" if cell.acceptance_rate is None else f"{cell.acceptance_rate.value:.2f}",
            "" if cell.mean_acceptance_length is None else f"{cell.mean_acceptance_length:.2f}",
        )
    return table


def figures_table(figures: Sequence[Figure]) -> Table:
    """One row for each figure."""
    table = _table("Greedy, one request at a time, unless it says otherwise")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("needed", justify="right", no_wrap=True)
    table.add_column("holds", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for figure in figures:
        value = f"{figure.value:.2f}"
        if figure.spread is not None:
            value = _with_spread(Estimate(figure.value, *figure.spread))
        table.add_row(figure.name, value, figure.needed, "yes" if figure.holds else "NO", figure.meaning)
    return table


def equality_line(results: Results) -> str:
    """Whether every completion that has to be plain decoding's is."""
    checked = [cell for cell in results.cells if cell.tokens_equal is not None and cell.system != PLAIN]
    count = sum(cell.num_runs for cell in checked)
    if results.differences:
        return f"DIFFERENT TOKENS in {len(results.differences)} of {count} completions compared with plain decoding's."
    return f"All {count} completions compared with plain decoding's have the same tokens."


def best_k_lines(cells: Sequence[Cell]) -> list[str]:
    """Where the policy is not within 5 % of the best fixed K, and why: chance, or what its steps are like."""
    found = [(cell.best_k, cell) for cell in cells if cell.best_k is not None]
    return [
        f"Slower than {best.name} ({described(cell.condition)}): {best.share.value:.2f} of its tokens/s{_why(best)}."
        for best, cell in found
        if not best.is_enough
    ]


def _why(best: BestK) -> str:
    parts = ""
    if best.error is not None:
        chance = f"may be chance, {NEEDED_SHARE:g} is within two" if best.may_be_enough else "more than chance"
        parts += f", standard error {best.error:.2f} ({chance})"
    if best.paces is not None:
        mine, its = best.paces
        parts += (
            f"; {mine.tokens_per_step:.2f} tokens a step against {its.tokens_per_step:.2f}, "
            f"{1000 * mine.step_s:.1f} ms a step against {1000 * its.step_s:.1f}"
        )
    return parts


def ideal_lines(cells: Sequence[Cell]) -> list[str]:
    """What each ideal is made of, and how much of it was reached."""
    lines = []
    for cell in cells:
        ideal, bare, ratio = cell.ideal, cell.bare, cell.ratio_to_ideal
        if ideal is not None and bare is not None and ratio is not None:
            step_ms = 1000 * bare.verify_s
            step = f"{ideal.mean_acceptance_length:.2f} per step of {step_ms:.2f} ms with K = {ideal.k}"
            total = f"{ideal.tokens_per_s(bare):.0f} tokens/s"
            lines.append(f"Ideal ({described(cell.condition)}): {total}, {step}; reached {_with_spread(ratio)}.")
    return lines


def memory_line(memory: Memory) -> str:
    """Resident memory by role."""
    parts = (f"{role} {count / 2**20:.0f}" for role, count in memory.resident_bytes.items())
    return f"Memory, MiB resident: {', '.join(parts)}."


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False)


def _with_spread(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.lower:.2f}-{estimate.upper:.2f})"


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value
