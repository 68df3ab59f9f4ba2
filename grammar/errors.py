"""What this package raises."""

from __future__ import annotations

_MAX_SHOWN_CHARS = 300


class GrammarError(Exception):
    """The grammar cannot be used, or no longer: it is malformed, unsatisfiable, or costs too much. Says which."""


def shown(problem: str) -> str:
    """The library's words on one line of bounded length: they may quote the whole grammar."""
    line = " ".join(problem.split("<state>")[0].split())
    return line if len(line) <= _MAX_SHOWN_CHARS else f"{line[:_MAX_SHOWN_CHARS]}..."
