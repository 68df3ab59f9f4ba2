"""Probabilities where a rule needs them (`rejection`, `block`): at the drafter's candidates, and in what they leave.

All functions work on *scores*: logits over temperature, -inf where top-k and top-p forbid a token. Rows of different
settings may be mixed; a row never depends on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inference.noise import gumbel, uniform
from inference.sampling import SamplingRow
from inference.warping import candidates

ACCEPT_STREAM = 2
"""Of `inference.noise`: what ratios are compared with."""


def warped_scores(logits: torch.Tensor, rows: Sequence[SamplingRow], limit: int | None = None) -> torch.Tensor:
    """Scores, float32 [R, min(V, limit)], of logits [R, V]; none of the rows may be greedy."""
    logits = logits[:, :limit]
    scores = torch.empty_like(logits, dtype=torch.float32)
    alike: dict[tuple[int, float], list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault((row.top_k, row.top_p), []).append(index)
    for (top_k, top_p), indices in alike.items():
        temperatures = torch.tensor(
            [rows[index].temperature for index in indices], dtype=torch.float32, device=logits.device
        )
        found = candidates(logits[indices] / temperatures.unsqueeze(1), top_k, top_p)
        scores[indices] = _dense(found.scores, found.token_ids, scores.shape[1])
    return scores


def _dense(found: torch.Tensor, token_ids: torch.Tensor | None, vocab_size: int) -> torch.Tensor:
    if token_ids is None:
        return found
    return found.new_full((len(found), vocab_size), float("-inf")).scatter_(1, token_ids, found)


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
    noise = gumbel(seeds, positions, torch.arange(scores.shape[1], device=scores.device))
    drawn: list[int] = noise.add_(left.log_()).argmax(-1).tolist()
    return drawn
