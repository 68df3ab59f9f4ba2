"""transformers' own ``generate`` as a system: a process of its own that idles while the others are measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from outrider.bench.systems import TRANSFORMERS_PLAIN, Run, Task
from outrider.failures import CommandFailed

_SOURCE_ROOT: Final = Path(__file__).resolve().parents[2]
_STREAM_LIMIT: Final = 2**24


@dataclass(frozen=True, slots=True)
class TransformersOptions:
    """What `outrider.bench.transformers_worker` is started with."""

    model: str
    num_threads: int
    device: str = "auto"
    dtype: str = "auto"


class TransformersSystem:
    """``async with TransformersSystem(options) as system``: asks the worker by JSON lines, one task at a time.

    Entering returns once the model is loaded. The worker ends with its standard input, so it never outlives us.
    """

    name = TRANSFORMERS_PLAIN

    def __init__(self, options: TransformersOptions) -> None:
        self._options = options
        self._turn = asyncio.Lock()

    def must_equal_plain(self, temperature: float) -> bool:
        """Greedy decoding needs no noise; above, transformers draws with its own."""
        return temperature == 0

    async def __aenter__(self) -> TransformersSystem:
        options = self._options
        self._process = await start_module(
            "outrider.bench.transformers_worker",
            *(options.model, str(options.num_threads), options.device, options.dtype),
        )
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

    async def run(self, task: Task) -> Run:
        """One completion, timed in the worker: neither the pipe nor tokenisation counts against transformers."""
        async with self._turn:
            assert self._process.stdin is not None
            request = {
                "prompt": task.prompt,
                "max_tokens": task.max_tokens,
                "temperature": task.temperature,
                "seed": task.seed,
            }
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
            answer = await self._answer()
        return Run(tuple(answer["token_ids"]), answer["first_token_s"], 1, answer["total_s"])

    async def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            code = await self._process.wait()
            raise CommandFailed(f"the transformers process ended with exit code {code}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CommandFailed(f"transformers: {answer['error']}")
        return answer

    async def _stop(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()  # it holds nothing that is worth a grace period
        await self._process.wait()


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
