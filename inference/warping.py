"""Min-p, top-k and top-p: which tokens a row may still draw.

All keep every token whose score reaches a threshold that depends on the row's scores alone. So equal scores, common
where a model computes in bfloat16, are kept or dropped together, and a row never depends on its batch. (Transformers
keeps ties at the top-k boundary too; at the top-p boundary it keeps some of them, by the order of its sort.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_FIRST_LOOK = 1024
"""Candidates sorted for top-p alone before the whole vocabulary is. Enough for all but the flattest rows."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may be drawn, and some that may not: those have score -inf."""

    scores: torch.Tensor
    """float32 [R, C]"""
    token_ids: torch.Tensor | None
    """int64 [R, C]; None: column c is token c."""

    def token_ids_or_all(self) -> torch.Tensor:
        """int64 [R, C] or [C]"""
        if self.token_ids is not None:
            return self.token_ids
        return torch.arange(self.scores.shape[1], device=self.scores.device)

    def token_ids_at(self, columns: torch.Tensor) -> list[list[int]]:
        """The tokens of some columns of each row; `columns` is int64 [R, N]."""
        chosen = columns if self.token_ids is None else self.token_ids.gather(1, columns)
        token_ids: list[list[int]] = chosen.tolist()
        return token_ids


def candidates(scores: torch.Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Candidates:
    """Apply min-p (off at 0), top-k (off at <= 0), then top-p (off at 1) to temperature-scaled scores, float32 [R, V].

    Scores of -inf, which an adjustment may have left, are as good as not there.
    """
    vocab_size = scores.shape[1]
    if min_p > 0:
        scores = _min_p(scores, min_p)
    if 0 < top_k < vocab_size:
        found = _top_k(scores, top_k)
        if top_p == 1:
            return found
        return _keep_from(_threshold(found.scores, _log_total(found.scores), top_p), found)
    if top_p == 1:
        return Candidates(scores, None)
    return _top_p(scores, top_p)


def _min_p(scores: torch.Tensor, min_p: float) -> torch.Tensor:
    threshold = scores.amax(-1, keepdim=True) + math.log(min_p)
    return scores.masked_fill(scores < threshold, float("-inf"))


def _top_k(scores: torch.Tensor, top_k: int) -> Candidates:
    best, token_ids = scores.topk(top_k)
    threshold = best[:, -1:].clamp(min=torch.finfo(scores.dtype).min)  # -inf is no tie
    num_kept = int((scores >= threshold).sum(-1).max())
    if num_kept > top_k:
        best, token_ids = scores.topk(num_kept)
    return _keep_from(threshold, Candidates(best, token_ids))


def _top_p(scores: torch.Tensor, top_p: float) -> Candidates:
    log_total = _log_total(scores)
    best, token_ids = scores.topk(min(_FIRST_LOOK, scores.shape[1]))
    threshold = _threshold(best, log_total, top_p)
    # The look was long enough if it goes beyond the last token kept and all that are as likely as that one.
    if best.shape[1] < scores.shape[1] and not bool((best[:, -1:] < threshold).all()):
        best, token_ids = scores.sort(descending=True)
        threshold = _threshold(best, log_total, top_p)
    return _keep_from(threshold, Candidates(best, token_ids))


def _threshold(best: torch.Tensor, log_total: torch.Tensor, top_p: float) -> torch.Tensor:
    """The lowest score among the most likely tokens that together reach `top_p`: [R, 1].

    `best` is [R, C], descending; `log_total` is [R, 1], the logarithm of all mass.
    """
    mass = (best.to(torch.float64) - log_total).exp()
    mass_before = mass.cumsum(-1) - mass
    # At least the first; the clamp is for a row of NaN, which must not end in an index error on the device.
    num_needed = (mass_before < top_p).sum(-1, keepdim=True).clamp(min=1)
    return best.gather(1, num_needed - 1)


def _log_total(scores: torch.Tensor) -> torch.Tensor:
    # In float64: rounding must not depend on how many columns the other rows have made necessary.
    return scores.to(torch.float64).logsumexp(-1, keepdim=True)


def _keep_from(threshold: torch.Tensor, found: Candidates) -> Candidates:
    return Candidates(found.scores.masked_fill(found.scores < threshold, float("-inf")), found.token_ids)
