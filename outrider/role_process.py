"""One role of the local stack as a child process, and the JSON status lines by which it reports to us."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from outrider.failures import FAILED, CommandFailed

StatusListener = Callable[[str, str], None]
"""Called with the role's name and what it is doing now, for people."""

_SOURCE_ROOT = Path(__file__).resolve().parent.parent


class RoleProcess:
    """``outrider <role>`` as a child that dies with us. Build it with `start`, end it with `stop`."""

    def __init__(self, role: str, process: Process, listener: StatusListener) -> None:
        self.role = role
        self.http_address = ""
        """Where the role serves HTTP, once it is ready; empty if it does not."""
        self._process = process
        self._listener = listener
        self._failure: CommandFailed | None = None
        self._stopping = False
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read_statuses())

    @classmethod
    async def start(
        cls, role: str, arguments: Sequence[str], listener: StatusListener, cores: set[int] | None = None
    ) -> RoleProcess:
        """Starts the role in its own session, so that a terminal's Ctrl-C reaches only us and we stop it in order."""
        process = await asyncio.create_subprocess_exec(
            # -P: packages are never imported from the directory that the user happens to be in.
            *(sys.executable, "-P", "-m", "outrider", role, "--status-json", *arguments),
            stdin=PIPE,
            stdout=PIPE,
            stderr=None,
            env=_environment(),
            start_new_session=True,
        )
        if cores is not None:
            with contextlib.suppress(OSError):  # it has ended already, or may not be moved
                os.sched_setaffinity(process.pid, cores)  # before it has threads, which will inherit it
        return cls(role, process, listener)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def ready(self) -> str:
        """The address that the role listens on, once it does. Raises `CommandFailed` with the role's own message."""
        return await asyncio.shield(self._address)

    async def ended(self) -> CommandFailed:
        """Waits for the end of the process and says why it ended."""
        await asyncio.shield(self._reader)
        return self._failure or CommandFailed(f"{self.role} {_exit_text(self._process.returncode)}")

    async def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then after ``grace_s`` SIGKILL; returns when the process is gone. Cancelled: SIGKILL at once."""
        self._stopping = True
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        finally:
            self._signal(signal.SIGKILL)
        await self._process.wait()
        await self._reader
        self._release()

    def kill(self) -> None:
        """SIGKILL now, without waiting."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _release(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._address.done() and not self._address.cancelled():
            self._address.exception()  # mark as seen: whoever stops a role need not have waited for it

    async def _read_statuses(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            status = _parse(line)
            if status is not None:
                self._apply(status)
        await self._process.wait()
        if not self._address.done():
            text = f"{self.role} {_exit_text(self._process.returncode)} before it was ready"
            self._address.set_exception(self._failure or CommandFailed(text))

    def _apply(self, status: dict[str, Any]) -> None:
        event, detail = str(status.get("event", "")), str(status.get("detail") or "")
        if event == "failed":
            self._failure = CommandFailed(f"{self.role}: {detail}", int(status.get("exit_code", FAILED)))
            return
        if event == "ready" and not self._address.done():
            self.http_address = str(status.get("http_address") or "")
            self._address.set_result(str(status.get("address", "")))
        if not self._stopping:
            self._listener(self.role, status_text(event, detail))


def status_text(event: str, detail: str) -> str:
    """A status for people. What is being loaded says enough without "loading" before it."""
    return detail if event == "loading" and detail else ": ".join(part for part in (event, detail) if part)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A status, or None for a line that is none (some library printed to stdout)."""
    try:
        status = json.loads(line)
    except ValueError:
        return None
    return status if isinstance(status, dict) else None


def _environment() -> dict[str, str]:
    search = [str(_SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search), "PYTHONUNBUFFERED": "1"}


def _exit_text(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"
