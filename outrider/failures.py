"""How the command line fails: one line that says what is wrong and what to do, and an exit code.

0 is success, 1 a failure at run time, 2 bad usage or bad input, 130 Ctrl-C.
"""

from __future__ import annotations

from typing import Final

import grpc

from rpc.errors import OutriderError
from telemetry.tracing import TracingUnavailable

FAILED: Final = 1
BAD_INPUT: Final = 2
INTERRUPTED: Final = 130

_INPUT_CODES: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class CommandFailed(Exception):
    """Ends the command with one line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


class BadUsage(CommandFailed):
    """A flag, variable, key or file that the command cannot work with."""

    def __init__(self, message: str) -> None:
        super().__init__(message, BAD_INPUT)


def describe(error: Exception) -> tuple[str, int]:
    """The line to show for an error, and the exit code that goes with it."""
    if isinstance(error, TracingUnavailable):
        return one_line(str(error)), BAD_INPUT
    if isinstance(error, CommandFailed):
        return one_line(error.message), error.exit_code
    if isinstance(error, OutriderError):
        return one_line(error.message), BAD_INPUT if error.grpc_code in _INPUT_CODES else FAILED
    if isinstance(error, ModuleNotFoundError) and error.name in {"torch", "transformers", "safetensors"}:
        return f"workers need {error.name}: pip install '.[worker]' in the source tree", BAD_INPUT
    return one_line(f"internal error: {type(error).__name__}: {error} (OUTRIDER_TRACEBACK=1 shows where)"), FAILED


def one_line(message: str) -> str:
    """``message`` without line breaks."""
    return " ".join(message.split())
