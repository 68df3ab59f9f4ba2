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
    if len(rows) == len(masks):
        return _without(scores, excluded, logits)
    result = scores.clone()
    part = scores[rows]
    result[rows] = _without(part, excluded, part if scores is logits else logits[rows])
    return result


def _without(scores: torch.Tensor, excluded: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    left = scores.masked_fill(excluded, float("-inf"))
    if scores is logits:  # nothing has been banned before
        return left
    is_stuck = left.amax(dim=1, keepdim=True).isneginf()
    return torch.where(is_stuck, logits.masked_fill(excluded, float("-inf")), left) if bool(is_stuck.any()) else left
