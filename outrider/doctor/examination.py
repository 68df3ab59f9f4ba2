"""The examination from start to end, on the calling thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from inference import ModelDescription, OutOfKVBlocks, SamplingRow, warm_up
from outrider.bench.bare_steps import step_times
from outrider.doctor.compatibility import Finding, compatibility, has_problem
from outrider.doctor.decoding import PlainText, Verification, decode_plainly, guess
from outrider.doctor.divergence import Verified
from outrider.doctor.memory import ModelMemory, memory_finding
from outrider.doctor.pair import Examined, load
from outrider.doctor.prediction import Predictions, StepTimes, predict
from outrider.doctor.rounding import Rounding
from outrider.doctor.settings import DoctorSettings
from outrider.failures import BadUsage
from speculation.cost import closest_never_falling

_MAX_PROMPT_TOKENS: Final = 512
"""Of a longer prompt the end is taken."""

OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """What running the pair has shown."""

    times: StepTimes
    predictions: tuple[Predictions, ...]
    verified: tuple[Verified, ...]
    rounding: Rounding


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was found out."""

    models: tuple[ModelDescription, ModelDescription]
    """Target and draft."""
    memory: tuple[ModelMemory, ModelMemory]
    findings: tuple[Finding, ...]
    measured: Measured | None
    """None: the two are no pair, so nothing was run."""
    token_text: Callable[[int], str]
    """A token id of the target as its vocabulary spells it."""


def examine(
    settings: DoctorSettings, names: tuple[str, str], prompts: Sequence[str], num_threads: int, on_progress: OnProgress
) -> Examination:
    """``names`` are target and draft. Raises `BadUsage`."""
    torch.set_num_threads(num_threads)
    target, draft = (
        load(
            role,
            name,
            device=settings.device,
            dtype=settings.dtype,
            kv_tokens=settings.kv_tokens,
            on_progress=on_progress,
        )
        for role, name in zip(("target", "draft"), names, strict=True)
    )
    memory = (target.memory, draft.memory)
    findings = [*compatibility(target.described, draft.described), memory_finding(memory)]
    measured = None if has_problem(findings) else _Examiner(settings, target, draft, on_progress).measure(prompts)
    return Examination(
        models=(target.description, draft.description),
        memory=memory,
        findings=tuple(findings),
        measured=measured,
        token_text=lambda token_id: target.tokenizer.id_to_token(token_id) or "",
    )


class _Examiner:
    """Runs a pair that goes together."""

    def __init__(self, settings: DoctorSettings, target: Examined, draft: Examined, on_progress: OnProgress) -> None:
        self._settings = settings
        self._target = target
        self._draft = draft
        self._report = on_progress

    def measure(self, prompts: Sequence[str]) -> Measured:
        token_ids = self._encoded(prompts)
        times = self._step_times()
        predictions: list[Predictions] = []
        verified: list[Verified] = []
        try:
            for temperature in self._settings.temperature_list:
                texts = self._texts(token_ids, temperature)
                predictions.append(self._predict(texts, times, temperature))
                verified += self._verify(texts, temperature)
        except OutOfKVBlocks:
            raise BadUsage(
                f"--kv-tokens {self._settings.kv_tokens} cannot hold {len(prompts)} prompts with their answers: "
                "raise it, or lower --prompts or --max-tokens"
            ) from None
        return Measured(times, tuple(predictions), tuple(verified), self._target.rounding)

    def _encoded(self, prompts: Sequence[str]) -> list[list[int]]:
        context = min(self._target.runtime.max_context, self._draft.runtime.max_context)
        room = context - self._settings.max_tokens - self._settings.max_k - 1
        if room < 1:
            raise BadUsage(f"--max-tokens {self._settings.max_tokens} leaves no room in a context of {context} tokens")
        size = min(room, _MAX_PROMPT_TOKENS)
        encoded = [self._target.tokenizer.encode(text).ids[-size:] for text in prompts]
        found = [ids for ids in encoded if ids]
        if not found:
            raise BadUsage("no sample prompt has a token in it: name others with --prompt-file")
        return found

    def _step_times(self) -> StepTimes:
        self._report("timing steps")
        for model in (self._target, self._draft):
            warm_up(model.runtime)
        sizes = range(1, self._settings.max_k + 2)
        target_s = step_times(self._target.runtime, sizes, self._target.limit)
        # More tokens are no faster: that was noise.
        target_s = dict(zip(sizes, closest_never_falling([(n, target_s[n], 1.0) for n in sizes]), strict=True))
        return StepTimes(target_s, step_times(self._draft.runtime, (1,), self._draft.limit)[1])

    def _texts(self, prompts: Sequence[Sequence[int]], temperature: float) -> list[PlainText]:
        self._report(f"decoding plainly at temperature {temperature:g}")
        texts = []
        for index, prompt in enumerate(prompts):
            row = SamplingRow(temperature, seed=index)
            text = decode_plainly(
                self._target.runtime, self._target.limit, index, prompt, row, self._settings.max_tokens
            )
            texts.append(replace(text, guesses=guess(self._draft.runtime, self._draft.limit, text)))
        return texts

    def _predict(self, texts: Sequence[PlainText], times: StepTimes, temperature: float) -> Predictions:
        self._report(f"predicting at temperature {temperature:g}")
        traces = [text.trace for text in texts if text.trace]
        if not traces:
            raise BadUsage("the draft cannot read any of the sample prompts: name others with --prompt-file")
        return predict(temperature, traces, times, self._settings.max_k, self._settings.latency_ms / 1000)

    def _verify(self, texts: Sequence[PlainText], temperature: float) -> list[Verified]:
        """Every text alone at each of some Ks, then all of them in one pass as a busy target has them."""
        results = []
        for k in some_ks(self._settings.max_k):
            way = f"K = {k}, alone"
            self._report(f"verifying at temperature {temperature:g}: {way}")
            alone = self._verification(way, k)
            for text in texts:
                alone.run([text])
            results.append(alone.result(temperature))
        if len(texts) > 1:
            together = self._verification(f"K = {self._settings.max_k}, {len(texts)} together", self._settings.max_k)
            together.run(texts)
            results.append(together.result(temperature))
        return results

    def _verification(self, way: str, k: int) -> Verification:
        return Verification(self._target.runtime, self._target.limit, self._target.rounding, way, k)


def some_ks(max_k: int) -> list[int]:
    """0 (plain steps once more), 1, 2, 4 ... and ``max_k`` itself."""
    powers = [1 << power for power in range(max_k.bit_length()) if 1 << power < max_k]
    return [0, *powers, max_k]
