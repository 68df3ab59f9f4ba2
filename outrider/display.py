"""What people see: progress on stderr, and text whose drafted and target tokens are told apart."""

from __future__ import annotations

from types import TracebackType

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from outrider.client import Finished, Token, Tokens

DRAFTED = "green"
LOOKED_UP = "cyan italic"
TARGET = "bold underline"  # told apart without colours too

_SHOWN = {0x1B: "␛", **dict.fromkeys(range(0x80, 0xA0), "�")}
"""Terminals begin commands with the characters from U+0080 on as well: U+009B is an escape and a bracket in one."""


class Progress:
    """Where the processes stand: a spinner on a terminal, a line for each change elsewhere. On stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._latest: dict[str, str] = {}
        self._spinner: Status | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._spinner = self._console.status("starting")
            self._spinner.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.done()

    def show(self, role: str, text: str) -> None:
        """News of one role; the same again is none."""
        if self._latest.get(role) == text:
            return
        self._latest[role] = text
        if self._spinner is None:
            self._console.print(f"{role}: {text}", markup=False)
        else:
            self._spinner.update(Text("   ".join(f"{role}: {text}" for role, text in self._latest.items())))

    def done(self) -> None:
        """Everything is up: no spinner from now on, but news are still shown."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None


class TokenPrinter:
    """Streams text to a console. On anything but a terminal: exactly the text, nothing else."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._ends_line = True

    @property
    def styled(self) -> bool:
        return self._console.is_terminal

    def legend(self) -> None:
        if self.styled:
            line = Text.assemble(
                ("drafted and accepted", DRAFTED), ", ", ("looked up in the text so far", LOOKED_UP), ", "
            )
            line.append_text(Text.assemble(("the target's own", TARGET), "\n"))
            self._console.print(line)

    def prompt(self, text: str, everywhere: bool = False) -> None:
        """The prompt, as context for what follows; on a terminal only, or ``everywhere``."""
        if self.styled:
            self._write(Text(_printable(text), style="dim"))
        elif everywhere:
            typer.echo(text, nl=False)

    def tokens(self, event: Tokens) -> None:
        if not event.text:
            return
        self._ends_line = event.text.endswith("\n")
        if not self.styled:
            typer.echo(event.text, nl=False)
        elif "".join(token.text for token in event.tokens) != event.text:
            self._write(Text(_printable(event.text)))
        else:
            pieces = [(_printable(token.text), _style(token)) for token in event.tokens]
            self._write(Text.assemble(*pieces))

    def end(self) -> None:
        """Ends the last line."""
        if not self._ends_line:
            typer.echo()

    def summary(self, finished: Finished) -> None:
        """One line of numbers, on a terminal only."""
        if self.styled:
            self._console.print(Text(summary_line(finished), style="dim"))

    def _write(self, text: Text) -> None:
        self._console.print(text, end="", soft_wrap=True)


def _style(token: Token) -> str:
    return DRAFTED if token.drafted else LOOKED_UP if token.looked_up else TARGET


def summary_line(finished: Finished) -> str:
    """Tokens, time and what speculation did, in one line."""
    stats, count, total_s = finished.speculation, finished.usage.completion_tokens, finished.timing.total_s
    line = f"{count} tokens in {total_s:.2f} s, {count / total_s if total_s else 0:.0f} tokens/s, ends by "
    line += finished.finish_reason
    if stats.num_drafted:
        line += f"; {stats.num_accepted} of {stats.num_drafted} drafted tokens accepted ({stats.acceptance_rate:.0%})"
    if stats.num_looked_up:
        line += f"; {stats.num_looked_up_accepted} of {stats.num_looked_up} looked-up tokens accepted"
    if stats.num_drafted or stats.num_looked_up:
        line += f"; {stats.mean_acceptance_length:.2f} tokens per step, mean K {stats.mean_k:.1f}"
    return line


def _printable(text: str) -> str:
    """A model's text must not drive the terminal."""
    return text.translate(_SHOWN)
