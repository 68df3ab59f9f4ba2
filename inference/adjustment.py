"""Bans, bias and penalties: what a row does to its logits before they are scaled, cut and drawn from.

In vLLM's order, which is transformers' where the two agree:

1. **bans**: the last token of a bad word that the output ends in all but, stop tokens that would come too early;
2. **bias**, added;
3. **repetition penalty** over prompt and output: positive logits are divided by it, others multiplied;
4. **frequency penalty**, times the token's count in the output, subtracted;
5. **presence penalty**, subtracted where that count is not 0.

Then follow temperature, min-p, top-k and top-p (`inference.sampling`, `inference.warping`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Penalties:
    """On tokens that the sequence has already; these values are off."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @property
    def is_off(self) -> bool:
        return self == _NO_PENALTIES


_NO_PENALTIES = Penalties()


@dataclass(frozen=True, slots=True, eq=False)
class SeenTokens:
    """The tokens of a sequence, each once, and how often they are in its output (0: in the prompt alone)."""

    token_ids: np.ndarray[tuple[int], np.dtype[np.int64]]
    num_in_output: np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Adjustment:
    """Of one row; a row without one costs nothing."""

    banned: Sequence[int] = ()
    bias_token_ids: Sequence[int] = ()
    biases: Sequence[float] = ()
    penalties: Penalties = _NO_PENALTIES
    seen: SeenTokens | None = None
    """Needed where a penalty is on."""


def adjusted(logits: torch.Tensor, adjustments: Sequence[Adjustment | None]) -> torch.Tensor:
    """A copy of float32 [R, V] with each row adjusted; rows without an adjustment are as they were."""
    scores = logits.clone()
    for row, adjustment in zip(scores, adjustments, strict=True):
        if adjustment is not None:
            _adjust_(row, adjustment)
    return scores


def _adjust_(scores: torch.Tensor, adjustment: Adjustment) -> None:
    """In place; ``scores`` is [V]."""
    if adjustment.banned:
        scores[_ids(adjustment.banned, scores)] = float("-inf")
    if adjustment.bias_token_ids:
        biases = torch.tensor(adjustment.biases, dtype=scores.dtype, device=scores.device)
        scores[_ids(adjustment.bias_token_ids, scores)] += biases
    if adjustment.seen is not None and len(adjustment.seen.token_ids):
        _penalise_(scores, adjustment.penalties, adjustment.seen)


def _penalise_(scores: torch.Tensor, penalties: Penalties, seen: SeenTokens) -> None:
    token_ids = torch.from_numpy(seen.token_ids).to(scores.device)
    num_in_output = torch.from_numpy(seen.num_in_output).to(scores.device)
    values = scores[token_ids]
    if penalties.repetition != 1:
        values = torch.where(values > 0, values / penalties.repetition, values * penalties.repetition)
    values = values - penalties.frequency * num_in_output
    scores[token_ids] = values - penalties.presence * (num_in_output > 0)


def _ids(token_ids: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=like.device)
