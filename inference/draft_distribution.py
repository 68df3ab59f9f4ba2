"""Drawing a draft from a distribution that fits into a message: the best tokens, with whole-numbered weights.

What is drawn from is what is sent. The weights of a row add up to 2**num_bits exactly, and the drawn token is the one
into whose share ``num_bits`` random bits fall, so its probability is exactly weight / 2**num_bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inference.noise import random_bits

DRAFT_STREAM = 1
"""Of `inference.noise`. Not that of the target's tokens: a draft must know nothing of what the target will draw."""


def truncated_weights(scores: torch.Tensor, top_n: int, num_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``top_n`` most likely tokens of each row, renormalised.

    Args:
        scores: float32 [R, V], -inf where a token may not be drawn; see `inference.sampling.warped`.
        top_n: at least 1.
        num_bits: the weights of a row add up to 2**num_bits.

    Returns:
        Token ids and weights, both int64 [R, min(top_n, V)], most likely first. Some weights may be 0.
    """
    best, token_ids = scores.topk(min(top_n, scores.shape[1]))
    shares = best.to(torch.float64).softmax(-1).cumsum(-1)
    # Rounding where shares end, and not the shares, keeps every weight within 1 of exact and their sum exact.
    ends = (shares * 2**num_bits).round_().to(torch.int64)
    ends[:, -1] = 2**num_bits
    return token_ids, ends.diff(dim=1, prepend=ends.new_zeros(len(ends), 1))


def pick(weights: torch.Tensor, seeds: Sequence[int], positions: Sequence[int], num_bits: int) -> torch.Tensor:
    """int64 [R]: the column drawn from each row of ``weights``, int64 [R, N], with the noise of seed and position.

    Two draws must share a seed and a position only if everything before them is the same.
    """
    bits = random_bits(seeds, positions, torch.zeros(1, dtype=torch.int64, device=weights.device), DRAFT_STREAM)
    point = (bits >> (64 - num_bits)) & (2**num_bits - 1)  # the sign bit's copies are masked away
    return torch.searchsorted(weights.cumsum(1), point, right=True).squeeze(1)
