"""A model that is a table behind the `Runtime` door: what it says depends on what its cache really holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference import Chunk, SequenceId
from tests.distribution.table_world import VOCAB_SIZE


class TableRuntime:
    """``logits`` has a row for every output prefix, numbered as `table_world` does; the prompt is one token."""

    vocab_size = VOCAB_SIZE
    max_context = 64
    num_free_tokens = 1 << 30

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._cached: dict[SequenceId, list[int]] = {}
        self._num_opened = 0

    def open(self) -> SequenceId:
        self._num_opened += 1
        sequence = SequenceId(self._num_opened)
        self._cached[sequence] = []
        return sequence

    def length(self, sequence: SequenceId) -> int:
        return len(self._cached[sequence])

    def forward(self, batch: Sequence[Chunk]) -> Tensor:
        contexts: list[int] = []
        for chunk in batch:
            cached = self._cached[chunk.sequence]
            cached += chunk.token_ids
            contexts += [context_of(cached[1 : len(cached) - back]) for back in reversed(range(chunk.num_logits))]
        return self._logits[torch.tensor(contexts, dtype=torch.int64)]

    def draw_chains(self, batch: Sequence[Chunk], rows: object, depth: int, *, limit: int, num_runners_up: int) -> None:
        """It cannot."""

    def truncate(self, sequence: SequenceId, length: int) -> None:
        del self._cached[sequence][length:]

    def fork(self, sequence: SequenceId) -> SequenceId:
        copy = self.open()
        self._cached[copy] = list(self._cached[sequence])
        return copy

    def free(self, sequence: SequenceId) -> None:
        del self._cached[sequence]


def context_of(output: Sequence[int]) -> int:
    context = 0
    for token in output:
        context = context * VOCAB_SIZE + 1 + token
    return context
