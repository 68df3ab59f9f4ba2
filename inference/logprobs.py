"""Log-probabilities of chosen tokens and of the most likely ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

LEAST_LOGPROB = -9999.0
"""Told instead of -inf or NaN, which JSON has no number for; vLLM and OpenAI use it too."""


class RowLogprobs(NamedTuple):
    """Of one row."""

    logprob: float
    """Of the chosen token."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens, best first; impossible ones are not among them."""


def logprobs(
    scores: torch.Tensor, token_ids: Sequence[int], num_top: int, *, limit: int | None = None
) -> list[RowLogprobs]:
    """One result per row.

    Args:
        scores: float32 [R, V], logits or warped scores.
        token_ids: R chosen tokens.
        num_top: how many of the most likely tokens are wanted.
        limit: only ids below it are among those; all of V counts for the probabilities.
    """
    if not len(scores):
        return []
    log_probabilities = scores.log_softmax(-1)
    chosen = log_probabilities.gather(1, torch.tensor(token_ids, device=scores.device).unsqueeze(1))
    possible = log_probabilities[:, :limit]
    best, columns = possible.topk(min(num_top, possible.shape[1]))
    return [
        RowLogprobs(_finite(logprob), tuple(pair for pair in zip(ids, top, strict=True) if pair[1] > LEAST_LOGPROB))
        for [logprob], ids, top in zip(chosen.tolist(), columns.tolist(), best.tolist(), strict=True)
    ]


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB  # NaN fails every comparison
