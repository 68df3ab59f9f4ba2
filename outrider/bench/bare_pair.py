"""Asks `outrider.bench.ideal_worker` for what the ideal is made of."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from outrider.bench.ideal import BareSteps, Ideal, mean_acceptance_length
from outrider.bench.json_process import JsonProcess
from outrider.launcher import StackOptions


class BarePair:
    """``async with BarePair(...) as bare``: the pair's models in a process that idles unless it is asked."""

    def __init__(
        self, options: StackOptions, num_threads: int, k: int, prompts: Sequence[str], max_tokens: int
    ) -> None:
        """``num_threads`` as the target worker has; ``k`` is the full K."""
        self._k = k
        self._texts = {"prompts": list(prompts), "max_tokens": max(max_tokens, k + 2)}
        self._lengths: dict[float, float] = {}
        self._process = JsonProcess(
            "outrider.bench.ideal_worker",
            *(options.target, options.draft or "", str(num_threads), options.device, options.dtype),
        )

    async def __aenter__(self) -> BarePair:
        await self._process.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._process.__aexit__(kind, error, traceback)

    async def time_steps(self) -> BareSteps:
        """A fraction of a second of bare steps."""
        answer = await self._process.ask({"steps": {"k": self._k}})
        return BareSteps(answer["plain_s"], answer["verify_s"], answer["eager_s"])

    async def ideal(self, temperature: float) -> Ideal:
        """What a step would commit; asked for once for each temperature."""
        if temperature not in self._lengths:
            answer = await self._process.ask({"agreement": {**self._texts, "temperature": temperature}})
            self._lengths[temperature] = mean_acceptance_length(answer["agreement"], self._k)
        return Ideal(self._k, self._lengths[temperature])
