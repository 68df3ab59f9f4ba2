"""Probabilities where a rule needs them (`rejection`, `block`): at the drafter's candidates, and in what they leave.

All functions work on *scores*, which are what `inference.sampling.warped` makes of logits: what a request asks for has
been applied to them, and what may not be drawn is -inf. A row never depends on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inference.noise import uniform
from inference.noise_ahead import gumbel_of_all

ACCEPT_STREAM = 2
"""Of `inference.noise`: what ratios are compared with."""


def probabilities_at(scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """float64 [R, C]: the probabilities of some tokens of each row; ``token_ids`` is int64 [R, C]."""
    log_total = scores.to(torch.float64).logsumexp(-1, keepdim=True)
    return (scores.gather(1, token_ids).to(torch.float64) - log_total).exp()


def accept_uniforms(seeds: Sequence[int], starts: Sequence[int], num_depths: int, device: torch.device) -> torch.Tensor:
    """float64 [R, num_depths]: what the ratios of one step are compared with.

    They belong to the step, which is named by the position ``start`` of its first token, and not to the positions of
    the drafted tokens: those that were refused come again in the next step, and no number may be used twice.
    """
    return uniform(seeds, starts, torch.arange(num_depths, device=device), ACCEPT_STREAM)


def draw_residual(
    scores: torch.Tensor,
    seeds: Sequence[int],
    positions: Sequence[int],
    token_ids: torch.Tensor,
    shares: torch.Tensor,
) -> list[int]:
    """One token per row from norm(max(0, p - share)), with the noise that the position has in plain decoding.

    Args:
        scores: float32 [R, V].
        seeds: R
        positions: R positions that the drawn tokens will have.
        token_ids: int64 [R, C]: where something is taken away.
        shares: float64 [R, C]: how much; infinite for a token that must not be drawn, 0 in the padding.
    """
    p = scores.to(torch.float64).softmax(-1)
    left = p.scatter_add(1, token_ids, -shares).clamp_(min=0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, p)  # all gone: p equals q but for rounding
    noise = gumbel_of_all(seeds, positions, scores.shape[1], scores.device)
    drawn: list[int] = left.log_().add_(noise).argmax(-1).tolist()
    return drawn
