"""transformers' own ``generate`` as systems: one process for all its ways of decoding, idle while others run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from outrider.bench.json_process import JsonProcess
from outrider.bench.systems import TRANSFORMERS_ASSISTED, TRANSFORMERS_LOOKUP, TRANSFORMERS_PLAIN, Run, Task

_MODES: Final[Mapping[str, str]] = {
    TRANSFORMERS_PLAIN: "plain",
    TRANSFORMERS_ASSISTED: "assisted",
    TRANSFORMERS_LOOKUP: "lookup",
}


@dataclass(frozen=True, slots=True)
class TransformersOptions:
    """What `outrider.bench.transformers_worker` is started with."""

    model: str
    num_threads: int
    device: str = "auto"
    dtype: str = "auto"
    assistant: str = ""
    """The draft model; empty: none, and no assisted generation."""


class TransformersProcess:
    """``async with TransformersProcess(options) as process``; it is shared by the systems that are made with it."""

    def __init__(self, options: TransformersOptions) -> None:
        self._process = JsonProcess(
            "outrider.bench.transformers_worker",
            *(options.model, str(options.num_threads), options.device, options.dtype, options.assistant),
        )

    async def __aenter__(self) -> TransformersProcess:
        await self._process.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._process.__aexit__(kind, error, traceback)

    async def run(self, mode: str, task: Task) -> Run:
        """One completion, timed in the worker: neither the pipe nor tokenisation counts against transformers."""
        answer = await self._process.ask(
            {
                "mode": mode,
                "prompt": task.prompt,
                "max_tokens": task.max_tokens,
                "temperature": task.temperature,
                "seed": task.seed,
            }
        )
        token_ids = tuple(answer["token_ids"])
        return Run(token_ids, answer["first_token_s"], answer["num_first_tokens"], answer["total_s"])


@dataclass(frozen=True, slots=True)
class TransformersSystem:
    """One of its ways of decoding, by the system's name."""

    name: str
    process: TransformersProcess

    def must_equal_plain(self, temperature: float) -> bool:
        """Greedy decoding needs no noise; above, transformers draws with its own."""
        return temperature == 0

    async def run(self, task: Task) -> Run:
        return await self.process.run(_MODES[self.name], task)
