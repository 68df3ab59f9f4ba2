"""``outrider simulate``: the same session code on a virtual clock."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from outrider.failures import BadUsage
from outrider.options import with_settings
from outrider.simulate.report import cells_table, report_object
from outrider.simulate.settings import SimulateSettings
from outrider.simulate.sweep import Sweep


@with_settings(SimulateSettings, "simulate")
def simulate(settings: SimulateSettings, config: Path | None = None) -> None:
    """Simulate deployments: any latency, acceptance, load and number of workers.

    The session code, planner and K policies are those of production, on a virtual clock; forward passes and links take
    the time that you say. Compares with plain decoding and with drafts that are always ready.
    """
    if settings.as_json is not None:
        _check_writable(settings.as_json)
    sweep = Sweep(settings)
    start_s = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=sweep.num_runs)
        cells = sweep.run(lambda: progress.advance(task))
    wall_s = time.monotonic() - start_s
    if settings.as_json is not None:
        whole = report_object(settings, cells, shlex.join(["outrider", *sys.argv[1:]]), sweep.num_sessions, wall_s)
        settings.as_json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    console.print(cells_table(cells))
    rate = sweep.num_sessions / wall_s
    console.print(f"{sweep.num_sessions} sessions simulated in {wall_s:.1f} s, {rate:.0f} a second", soft_wrap=True)


def _check_writable(file: Path) -> None:
    """Raises `BadUsage`."""
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise BadUsage(f"--json {file}: {error.strerror}") from None
