"""The results of a sweep as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich import box
from rich.table import Table

from outrider.simulate.settings import SimulateSettings, rates_of
from outrider.simulate.sweep import IDEAL, PLAIN, Cell, Condition

_AXES: Final = ("ms\naway", "accept-\nance", "at\nonce")
_COLUMNS: Final = (
    "tokens\n/s",
    "times\nplain",
    "of the\nideal",
    "accept\nrate",
    "per\nstep",
    "free\nruns",
    "misses\ncaught",
    "drafts\na token",
)


def cells_table(cells: Sequence[Cell]) -> Table:
    """One line per system; the fastest one that could be built is in bold. An axis of one value has no column."""
    conditions = list(dict.fromkeys(cell.condition for cell in cells))
    varying = [index for index in range(len(_AXES)) if len({_shown(one)[index] for one in conditions}) > 1]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index in varying:
        table.add_column(_AXES[index], justify="right", no_wrap=True)
    table.add_column("\nsystem", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for condition in conditions:
        found = [cell for cell in cells if cell.condition == condition]
        best = max((cell for cell in found if cell.system != IDEAL), key=lambda cell: cell.report.tokens_per_s)
        for row, cell in enumerate(found):
            style = "bold" if cell is best else "dim" if cell.system in (PLAIN, IDEAL) else ""
            axes = [_shown(condition)[index] if row == 0 else "" for index in varying]
            table.add_row(*axes, cell.system, *_values(cell), style=style)
        table.add_section()
    return table


def _shown(condition: Condition) -> tuple[str, str, str]:
    return f"{condition.latency_ms:g}", condition.acceptance, str(condition.concurrency)


def _values(cell: Cell) -> tuple[str, ...]:
    report = cell.report
    speculates = report.num_proposed > 0
    return (
        f"{report.tokens_per_s:.1f}",
        f"{cell.ratio_to_plain:.2f}",
        f"{cell.ratio_to_ideal:.2f}",
        f"{report.acceptance_rate:.2f}" if report.num_drafted else "",
        f"{report.acceptance_length:.2f}",
        f"{100 * report.free_run_share:.0f} %" if speculates else "",
        f"{100 * report.caught_share:.0f} %" if report.num_misses else "",
        f"{report.proposed_per_token:.2f}" if speculates else "",
    )


def report_object(
    settings: SimulateSettings, cells: Sequence[Cell], command: str, num_sessions: int, wall_s: float
) -> dict[str, object]:
    """The whole run as one JSON object."""
    return {
        "command": command,
        "settings": settings.model_dump(mode="json", exclude={"as_json"}),
        "wall_s": wall_s,
        "simulated_sessions_per_s": num_sessions / wall_s,
        "cells": [cell_object(cell) for cell in cells],
    }


def cell_object(cell: Cell) -> dict[str, object]:
    """One element of ``cells``."""
    report = cell.report
    return {
        "system": cell.system,
        "concurrency": cell.condition.concurrency,
        "one_way_latency_ms": cell.condition.latency_ms,
        "acceptance": list(rates_of(cell.condition.acceptance)),
        "tokens_per_s": report.tokens_per_s,
        "ratio_to_plain": cell.ratio_to_plain,
        "ratio_to_ideal": cell.ratio_to_ideal,
        "acceptance_rate": report.acceptance_rate if report.num_drafted else None,
        "mean_acceptance_length": report.acceptance_length,
        "mean_k": report.mean_k,
        "free_run_share": report.free_run_share,
        "caught_share": report.caught_share if report.num_misses else None,
        "proposed_per_token": report.proposed_per_token,
        "ttft_ms": {f"p{p}": 1000 * report.first_token_at(p) for p in (50, 90, 99)},
        "tpot_ms": {f"p{p}": 1000 * report.per_token_at(p) for p in (50, 90, 99)},
        "elapsed_s": report.elapsed_s,
        "counts": {name: getattr(report, name) for name in report.__slots__ if name.startswith("num_")},
        "target_busy_s": report.target_busy_s,
        "target_waited_s": report.target_waited_s,
        "draft_busy_s": report.draft_busy_s,
    }
