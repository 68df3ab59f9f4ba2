"""``outrider bench``: measure this machine and a pair."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console

from outrider.bench.figures import figures_of
from outrider.bench.machine import machine
from outrider.bench.plot import check_plotting, plot_cells
from outrider.bench.progress import BenchProgress
from outrider.bench.report import (
    best_k_lines,
    cells_tables,
    equality_line,
    figures_table,
    ideal_lines,
    memory_line,
    report,
)
from outrider.bench.settings import BenchSettings
from outrider.bench.stages import Bench, Results, target_threads
from outrider.failures import BadUsage, CommandFailed
from outrider.launcher import StackOptions, stack_options
from outrider.options import with_settings
from outrider.termination import cancel_on_sigterm


@with_settings(BenchSettings, "bench")
def bench(settings: BenchSettings, config: Path | None = None) -> None:
    """Measure this machine and this pair.

    Runs every system in turn, right beside plain decoding through the same server, checks that the tokens are equal,
    and prints medians with their quartiles. Leave the machine alone meanwhile.
    """
    if settings.as_json is not None:
        _check_writable("json", settings.as_json)
    if settings.plot is not None:
        _check_writable("plot", settings.plot)
        check_plotting()
    options = stack_options(settings, config)
    found_machine = machine()  # before we make it busy ourselves
    results = asyncio.run(_bench(settings, options))
    if settings.as_json is not None:
        whole = report(results, found_machine, _pair(options), _settings(settings), _command_line())
        settings.as_json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if settings.plot is not None:
        plot_cells(results.cells, settings.plot)
    _show(results, settings.quick)
    if results.differences:
        count, first = len(results.differences), results.differences[0]
        raise CommandFailed(f"{count} completions have other tokens than they must, this is a defect; {first}")


async def _bench(settings: BenchSettings, options: StackOptions) -> Results:
    cancel_on_sigterm()
    with BenchProgress() as progress:
        run = Bench(settings, options, progress)
        progress.expect(run.num_rounds)
        return await run.run()


def _show(results: Results, quick: bool) -> None:
    console = Console(highlight=False)
    for table in cells_tables(results.cells):
        console.print(table, "")
    figures = figures_of(results.cells, results.memory)
    if figures:
        console.print(figures_table(figures))
    if quick:
        console.print("So few runs judge nothing; leave out --quick for that.")
    for line in (*ideal_lines(results.cells), *best_k_lines(results.cells), equality_line(results)):
        console.print(line, soft_wrap=True)
    if results.memory is not None:
        console.print(memory_line(results.memory), soft_wrap=True)


def _pair(options: StackOptions) -> dict[str, object]:
    return {
        "target": _shown(options.target),
        "draft": options.draft and _shown(options.draft),
        "device": options.device,
        "dtype": options.dtype,
        "target_threads": target_threads(options),
        "policy": options.policy,
        "max_k": options.max_k,
    }


def _shown(model: str) -> str:
    """A folder as seen from here: a report says nothing about where on this machine that is."""
    path = Path(model)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else model


def _settings(settings: BenchSettings) -> dict[str, object]:
    return {
        "quick": settings.quick,
        "prompts": settings.num_prompts,
        "max_tokens": settings.num_tokens,
        "repeats": settings.num_repeats,
        "concurrency": settings.concurrency_list,
        "latencies": settings.latency_list,
        "temperatures": settings.temperature_list,
        "acceptances": settings.acceptance_list,
        "fixed_ks": settings.fixed_k_list,
        "slow_target": settings.slow_target,
    }


def _command_line() -> str:
    return shlex.join(["outrider", *sys.argv[1:]])


def _check_writable(flag: str, file: Path) -> None:
    """Minutes of measuring must not end in a file that cannot be written. Raises `BadUsage`."""
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise BadUsage(f"--{flag} {file}: {error.strerror}") from None
