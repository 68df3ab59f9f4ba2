"""Many sequences' new tokens laid end to end: what one step computes, and where its keys and values go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inference.kv_pool import KVPool
from inference.runtime import Chunk


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One sequence's part of the step: rows [start, stop) of the packed batch."""

    start: int
    stop: int
    num_cached: int
    """Positions [0, num_cached) were computed by earlier steps; the rows are [num_cached, context)."""
    blocks: list[int]
    """The block table, the new positions included."""

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def context(self) -> int:
        return self.num_cached + self.num_tokens


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One step's input. T is the number of tokens over all sequences."""

    token_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T]"""
    logit_rows: torch.Tensor | None
    """int64 [N], the rows that meet the LM head; None if all do."""
    num_logits: int
    sequences: tuple[PackedSequence, ...]


def pack(batch: Sequence[Chunk], pool: KVPool, device: torch.device, num_ahead: int = 0) -> PackedBatch:
    """Lay out a batch whose growth `pool` has already granted, and that of `num_ahead` more tokens of each sequence."""
    token_ids: list[int] = []
    position_ids: list[int] = []
    logit_rows: list[int] = []
    sequences: list[PackedSequence] = []
    for chunk in batch:
        start = len(token_ids)
        token_ids.extend(chunk.token_ids)
        stop, context = len(token_ids), pool.length(chunk.sequence) - num_ahead
        num_cached = context - (stop - start)
        position_ids.extend(range(num_cached, context))
        logit_rows.extend(range(stop - chunk.num_logits, stop))
        sequences.append(PackedSequence(start, stop, num_cached, pool.blocks(chunk.sequence)))
    # One tensor, so one copy to the device.
    ids = torch.tensor([token_ids, position_ids], dtype=torch.int64, device=device)
    wants_all = len(logit_rows) == len(token_ids)
    rows = None if wants_all else torch.tensor(logit_rows, dtype=torch.int64, device=device)
    return PackedBatch(ids[0:1], ids[1:2], rows, len(logit_rows), tuple(sequences))
