"""The one door to a model: what a worker may ask of it, whatever runs behind.

A `Runtime` holds the weights and the keys and values of many sequences. It is not thread-safe: one thread owns it
(see `model_thread.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

import torch

from inference.sampling import Draws, SamplingRow

SequenceId = NewType("SequenceId", int)


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence in a packed batch: they go to positions [length, length + len(token_ids))."""

    sequence: SequenceId
    token_ids: Sequence[int]
    num_logits: int
    """Logits are wanted for the last `num_logits` tokens: 1 for a decode, K + 1 to verify K drafted tokens,
    0 for a prefill chunk that is not the prompt's last."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"sequence {self.sequence}: a chunk needs at least one token")
        if not 0 <= self.num_logits <= len(self.token_ids):
            raise ValueError(
                f"sequence {self.sequence}: num_logits must be in [0, {len(self.token_ids)}], got {self.num_logits}"
            )


class Runtime(Protocol):
    """A causal language model with a KV pool, run in packed ragged batches."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits. May exceed the tokenizer's size; see `sampling.draw(limit=...)`."""
        ...

    @property
    def max_context(self) -> int:
        """Most tokens that one sequence may hold."""
        ...

    @property
    def num_free_tokens(self) -> int:
        """KV positions in blocks that no sequence holds. Room left inside a sequence's last block is not counted."""
        ...

    def open(self) -> SequenceId:
        """A new empty sequence. Costs nothing until it holds tokens."""
        ...

    def length(self, sequence: SequenceId) -> int:
        """Tokens of `sequence` whose keys and values are held: its next token goes to this position."""
        ...

    def forward(self, batch: Sequence[Chunk]) -> torch.Tensor:
        """Append every chunk to its sequence and return the wanted logits.

        Any mix of prefill chunks, decodes and verifications; each sequence at most once.

        Returns:
            float32 [sum(num_logits), vocab_size] on the model's device, rows in batch order. A row predicts the
            token that follows the one it was computed from.

        Raises:
            OutOfKVBlocks, ContextOverflow, UnknownSequence, ValueError (duplicate sequence, token id out of range):
            each before any state has changed.
        """
        ...

    def draw_chains(
        self, batch: Sequence[Chunk], rows: Sequence[SamplingRow], depth: int, *, limit: int, num_runners_up: int
    ) -> Draws | None:
        """Append every chunk, draw what follows, append that, and so on: ``depth`` tokens of each sequence in one go.

        What `forward` with one logit of each chunk and `sampling.draw` would do ``depth`` times in turn, but for the
        last bits of scores. The last token drawn is not appended.

        Args:
            batch: chunks with ``num_logits`` 1.
            rows: how each chunk's tokens are drawn.
            depth: at least 1.
            limit: only ids below it are drawn.
            num_runners_up: how many next best tokens are wanted for each.

        Returns:
            len(batch) * depth tokens, those of the first chunk first; None, with nothing changed, if this runtime or
            this batch cannot.

        Raises:
            As `forward`.
        """
        ...

    def truncate(self, sequence: SequenceId, length: int) -> None:
        """Roll back to the first `length` tokens (at most the present length); whole blocks beyond are freed."""
        ...

    def fork(self, sequence: SequenceId) -> SequenceId:
        """A copy that goes its own way: shares the full blocks, copies the last partial one.

        Raises:
            OutOfKVBlocks: no block is free for that copy.
        """
        ...

    def free(self, sequence: SequenceId) -> None:
        """Forget the sequence; its id is never given out again."""
        ...
