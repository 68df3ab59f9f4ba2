"""SIGTERM ends a command as Ctrl-C does: by cancelling its main task, so that everything on the way is closed."""

from __future__ import annotations

import asyncio
import contextlib
import signal


def cancel_on_sigterm() -> None:
    """Call first thing in the main task; afterwards SIGTERM raises ``CancelledError`` in it."""
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(NotImplementedError, RuntimeError):  # no signals off the main thread, or on Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
