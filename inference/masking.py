"""Rows that may draw some tokens only: everything else becomes impossible before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def exclude(scores: torch.Tensor, masks: Sequence[bytes | None], logits: torch.Tensor) -> torch.Tensor:
    """``scores``, float32 [R, V], with -inf for what each row's mask excludes; ``scores`` itself if there is no mask.

    A mask has one bit per token, the lowest of each byte first. None excludes nothing; a token that a mask has no bit
    for is excluded. Where nothing would be left, since ``scores`` are ``logits`` with some tokens banned, the bans do
    not count in that row: what the mask allows is said in any case.
    """
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return scores
    packed = np.frombuffer(b"".join([mask for mask in masks if mask is not None]), np.uint8).reshape(len(rows), -1)
    allowed = np.unpackbits(packed, axis=1, count=scores.shape[1], bitorder="little").view(np.bool_)
    excluded = torch.from_numpy(~allowed).to(scores.device)
    left = scores[rows].masked_fill(excluded, float("-inf"))
    is_stuck = left.isneginf().all(dim=1, keepdim=True)
    result = scores.clone()
    result[rows] = torch.where(is_stuck, logits[rows].masked_fill(excluded, float("-inf")), left)
    return result
