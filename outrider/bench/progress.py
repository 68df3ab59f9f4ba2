"""How far a bench is: a bar on a terminal, a line for each stage and condition elsewhere. On stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from outrider.bench.figures import described
from outrider.bench.measure import Condition, Difference, Observer

_REFRESHES_PER_S: Final = 2
"""Few: drawing takes processor time from what is measured."""


class BenchProgress(Observer):
    """``with BenchProgress() as progress``; say with `expect` how much there is to do."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=_REFRESHES_PER_S,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._latest = ""

    def __enter__(self) -> BenchProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, num_rounds: int) -> None:
        """So many rounds will begin and end."""
        self._bar.update(self._task, total=num_rounds)

    def stage(self, text: str) -> None:
        self._say(text, text)

    def begins(self, system: str, condition: Condition) -> None:
        where = described(condition)
        self._say(f"{system}, {where}", f"measuring, {where}")

    def ends(self) -> None:
        self._bar.advance(self._task)

    def differs(self, difference: Difference) -> None:
        self._console.print(f"TOKENS DIFFER: {difference}", markup=False)

    def _say(self, on_bar: str, line: str) -> None:
        self._bar.update(self._task, description=on_bar)
        if self._bar.disable and line != self._latest:
            self._console.print(line, markup=False)
        self._latest = line
