"""Rows that may draw some tokens only: everything else becomes impossible before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def exclude(logits: torch.Tensor, masks: Sequence[bytes | None]) -> torch.Tensor:
    """``logits``, float32 [R, V], with -inf for each token that its row's mask excludes.

    A mask has one bit per token, the lowest of each byte first, and at least V of them; None excludes nothing.
    Without any mask it is ``logits`` itself, else a copy.
    """
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return logits
    packed = np.frombuffer(b"".join([mask for mask in masks if mask is not None]), np.uint8).reshape(len(rows), -1)
    allowed = np.unpackbits(packed, axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    excluded = torch.from_numpy(~allowed).to(logits.device)
    if len(rows) == len(masks):
        return logits.masked_fill(excluded, float("-inf"))
    result = logits.clone()
    result[rows] = logits[rows].masked_fill(excluded, float("-inf"))
    return result
