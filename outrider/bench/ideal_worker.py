"""``python -m outrider.bench.ideal_worker TARGET DRAFT THREADS DEVICE DTYPE``: the pair bare, in one process.

Two questions, each a JSON object on a line: ``{"agreement": {prompts, temperature, max_tokens}}`` is answered by one
list for each prompt (does the draft draw the target's token?), ``{"steps": {"k": 6}}`` by the bare times of a plain
step, of one with K drafted tokens, and of a plain one by transformers' layers, forward and draws.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import torch
from tokenizers import Tokenizer

from inference import Chunk, SamplingRow, draw, load_model, load_tokenizer_json
from outrider.bench.bare_steps import StepTimer
from outrider.bench.json_answers import serve

_NUM_TIMED: Final = 11
"""Steps of each kind, each time that they are asked for, which is often; of transformers' slow ones half as many."""

_EAGER_KV_TOKENS: Final = 1024
"""More than the timed steps have before them."""


class BarePair:
    """Both models of a pair on this thread."""

    def __init__(self, target: str, draft: str, num_threads: int, device: str, dtype: str) -> None:
        torch.set_num_threads(num_threads)
        self._target = load_model(target, device=device, dtype=dtype).runtime
        self._eager = load_model(target, device=device, dtype=dtype, kv_tokens=_EAGER_KV_TOKENS, fuse=False).runtime
        self._draft = load_model(draft, device=device, dtype=dtype).runtime
        self._tokenizer = Tokenizer.from_str(load_tokenizer_json(target))
        self._timers: dict[int, tuple[StepTimer, StepTimer]] = {}  # by K: of our layers and of transformers'

    def answer(self, question: dict[str, Any]) -> dict[str, object]:
        if "steps" in question:
            return self._step_times(question["steps"]["k"])
        return {"agreement": self._agreement(**question["agreement"])}

    def _agreement(self, prompts: Sequence[str], temperature: float, max_tokens: int) -> list[list[bool]]:
        prompt_ids = [self._tokenizer.encode(prompt).ids for prompt in prompts]
        rows = [SamplingRow(temperature, seed=seed) for seed in range(len(prompts))]
        texts = self._decode(prompt_ids, rows, max_tokens)
        return [self._agrees(*one) for one in zip(prompt_ids, texts, rows, strict=True)]

    def _decode(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[SamplingRow], max_tokens: int
    ) -> list[list[int]]:
        """The target's own text after each prompt, all in one batch."""
        sequences = [self._target.open() for _ in prompts]
        texts: list[list[int]] = [[] for _ in prompts]
        new: list[list[int]] = [list(prompt) for prompt in prompts]
        for step in range(max_tokens):
            logits = self._target.forward([Chunk(*one, 1) for one in zip(sequences, new, strict=True)])
            drawn = draw(logits, rows, [len(prompt) + step for prompt in prompts], limit=self._limit).token_ids
            new = [[token_id] for token_id in drawn]
            for text, token_id in zip(texts, drawn, strict=True):
                text.append(token_id)
        for sequence in sequences:
            self._target.free(sequence)
        return texts

    def _agrees(self, prompt: Sequence[int], text: Sequence[int], row: SamplingRow) -> list[bool]:
        """One pass of the draft over the whole text."""
        sequence = self._draft.open()
        logits = self._draft.forward([Chunk(sequence, [*prompt, *text[:-1]], len(text))])
        self._draft.free(sequence)
        positions = range(len(prompt), len(prompt) + len(text))
        drawn = draw(logits, [row] * len(text), positions, limit=self._limit).token_ids
        return [mine == its for mine, its in zip(drawn, text, strict=True)]

    @property
    def _limit(self) -> int:
        return self._tokenizer.get_vocab_size()

    def _step_times(self, k: int) -> dict[str, object]:
        if k not in self._timers:
            fused, eager = StepTimer(self._target, (1, k + 1), self._limit), StepTimer(self._eager, (1,), self._limit)
            self._timers[k] = fused, eager
        fused, eager = self._timers[k]
        times = fused.medians_s(_NUM_TIMED)
        return {"plain_s": times[1], "verify_s": times[k + 1], "eager_s": eager.medians_s(_NUM_TIMED // 2)[1]}


def main() -> None:
    target, draft, num_threads, device, dtype = sys.argv[1:]
    serve(lambda: BarePair(target, draft, int(num_threads), device, dtype).answer)


if __name__ == "__main__":
    main()
