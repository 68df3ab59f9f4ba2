"""``outrider simulate``: the same session code on a virtual clock."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from outrider.failures import BadUsage
from outrider.options import with_settings
from outrider.simulate.calibration import Calibration
from outrider.simulate.report import cells_table, report_object
from outrider.simulate.settings import SimulateSettings
from outrider.simulate.sweep import Sweep
from outrider.simulate.validation import Comparison, comparison_table, validate, validation_object
from outrider.termination import cancel_on_sigterm


@with_settings(SimulateSettings, "simulate")
def simulate(settings: SimulateSettings, config: Path | None = None) -> None:
    """Simulate deployments: any latency, acceptance, load and number of workers.

    The session code, planner and K policies are those of production, on a virtual clock; forward passes and links take
    the time that you say. Compares with plain decoding and with drafts that are always ready. Simulated texts never
    repeat themselves, so nothing is looked up; --validate replays real ones.
    """
    if settings.as_json is not None:
        _check_writable(settings.as_json)
    whole = _validate(settings) if settings.as_validate else _sweep(settings)
    if settings.as_json is not None:
        settings.as_json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _sweep(settings: SimulateSettings) -> dict[str, object]:
    sweep = Sweep(settings)
    start_s = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=sweep.num_runs)
        cells = sweep.run(lambda: progress.advance(task))
    wall_s = time.monotonic() - start_s
    console = Console(highlight=False)
    console.print(cells_table(cells))
    rate = sweep.num_sessions / wall_s
    console.print(f"{sweep.num_sessions} sessions simulated in {wall_s:.1f} s, {rate:.0f} a second", soft_wrap=True)
    return report_object(settings, cells, _command_line(), sweep.num_sessions, wall_s)


def _validate(settings: SimulateSettings) -> dict[str, object]:
    calibration, comparisons = asyncio.run(_validation(settings.bench))
    Console(highlight=False).print(comparison_table(comparisons))
    return validation_object(calibration, comparisons, _command_line())


async def _validation(bench: Path | None) -> tuple[Calibration, list[Comparison]]:
    cancel_on_sigterm()
    console = Console(stderr=True, highlight=False)
    return await validate(bench, lambda stage: console.print(stage))


def _command_line() -> str:
    return shlex.join(["outrider", *sys.argv[1:]])


def _check_writable(file: Path) -> None:
    """Raises `BadUsage`."""
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise BadUsage(f"--json {file}: {error.strerror}") from None
