"""A Python module of ours as a process that answers JSON lines: torch stays out of the process that measures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from outrider.failures import CommandFailed

_SOURCE_ROOT: Final = Path(__file__).resolve().parents[2]
_STREAM_LIMIT: Final = 2**24


class JsonProcess:
    """``async with JsonProcess(module, *arguments) as process: await process.ask({...})``.

    Entering returns once the module has answered for the first time, that is, when it is ready. It ends with its
    standard input, so it never outlives us, and it idles while it is not asked.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._module = module
        self._arguments = arguments
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> JsonProcess:
        self._process = await start_module(self._module, *self._arguments)
        try:
            await self._answer()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    async def ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        """One question at a time. Raises `CommandFailed` with the process's own words, or if it has ended."""
        async with self._turn:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            await self._process.stdin.drain()
            return await self._answer()

    async def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            code = await self._process.wait()
            raise CommandFailed(f"{self._module} ended with exit code {code}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CommandFailed(f"{self._module}: {answer['error']}")
        return answer

    async def _stop(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()  # it holds nothing that is worth a grace period
        await self._process.wait()


async def run_module(module: str, *arguments: str) -> None:
    """Runs it to its end. Raises `CommandFailed` if it fails."""
    process = await start_module(module, *arguments)
    try:
        await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise CommandFailed(f"{module} ended with exit code {process.returncode}; its messages are above")


async def start_module(module: str, *arguments: str) -> Process:
    """``python -m module`` from this source tree, with pipes; Ctrl-C reaches only us."""
    search = [str(_SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, *arguments),
        stdin=PIPE,
        stdout=PIPE,
        stderr=None,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), "TOKENIZERS_PARALLELISM": "false"},
        start_new_session=True,
        limit=_STREAM_LIMIT,
    )
