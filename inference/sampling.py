"""From logits to tokens: `argmax(warped_logits + gumbel(seed, position, token))`, or plain argmax at temperature 0.

A row's token depends on its own logits, settings and position alone, never on the other rows of the batch, so a
sequence says the same whatever it is batched with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from inference.adjustment import Adjustment, adjusted
from inference.masking import exclude
from inference.noise import gumbel
from inference.noise_ahead import gumbel_of_all, is_made_ahead
from inference.warping import Candidates, candidates

_GREEDY_BELOW = 1e-5
"""Lower temperatures would overflow float32, and draw the most likely token anyway."""

_MAX_NOISE_ELEMENTS = 1 << 22
"""Bounds the memory of the noise to some tens of MB, by taking rows in turns."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row is drawn. First comes the adjustment, then temperature, min-p, top-k, top-p: vLLM's order, and
    transformers' but for min-p, which that has last."""

    temperature: float = 1.0
    """0 (anything below 1e-5) takes the most likely token, and the rest does not matter."""
    top_k: int = 0
    """Keep the k most likely tokens (and those as likely as the last of them); 0 or less, or >= vocabulary: all."""
    top_p: float = 1.0
    """Keep the most likely tokens until their mass reaches top_p, at least one; 1: all."""
    seed: int = 0
    """Taken modulo 2**64."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one; 0: all."""
    adjustment: Adjustment | None = None
    """What is done to the logits before anything else."""
    allowed: bytes | None = None
    """Which tokens may be drawn at all, as `inference.masking.exclude` takes it; at least one. None: all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    @property
    def is_plain(self) -> bool:
        """Every token may be drawn, by its logit and the temperature alone."""
        is_whole = self.is_greedy or (self.top_k <= 0 and self.top_p >= 1 and self.min_p <= 0)
        return is_whole and self.adjustment is None and self.allowed is None

    def with_adjustment(self, adjustment: Adjustment) -> SamplingRow:
        """The same row with its logits adjusted."""
        return replace(self, adjustment=adjustment)

    def with_allowed(self, allowed: bytes) -> SamplingRow:
        """The same row, in which only these tokens may be drawn."""
        return replace(self, allowed=allowed)


@dataclass(frozen=True, slots=True)
class Draws:
    """One token per row."""

    token_ids: list[int]
    runners_up: list[list[RunnerUp]]
    """Per row the next best tokens, best first; as many as asked for, fewer where fewer may be drawn."""


class RunnerUp(NamedTuple):
    """A token that would have been drawn had the scores been a little different."""

    token_id: int
    gap: float
    """By how much its score, noise included, is below that of the drawn token; 0 or more."""


def draw(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    positions: Sequence[int],
    *,
    limit: int | None = None,
    num_runners_up: int = 0,
) -> Draws:
    """Draw one token per row.

    Args:
        logits: float32 [R, V]; not changed.
        rows: R settings.
        positions: R positions that the drawn tokens will have, counted from the start of the prompt.
        limit: only ids below it are drawn (the tokenizer's size, where the LM head is padded beyond it).
        num_runners_up: how many next best tokens are wanted for each row.

    Raises:
        ValueError: the lengths disagree.
    """
    num_rows, vocab_size = logits.shape
    if not num_rows == len(rows) == len(positions):
        raise ValueError(f"{num_rows} rows of logits, {len(rows)} settings and {len(positions)} positions")
    if limit is not None and limit < vocab_size:
        logits = logits[:, :limit]
    logits = _prepared(logits, rows)
    if not num_runners_up and all(row.is_greedy for row in rows):
        return Draws(logits.argmax(-1).tolist(), [])
    token_ids: list[int] = [0] * len(rows)
    runners_up: list[list[RunnerUp]] = [[] for _ in rows]
    for indices in _groups(rows, logits.shape[1]):
        # Slicing costs a copy of the logits; most batches are one group.
        group_logits = logits if len(indices) == len(rows) else logits[indices]
        drawn = _draw_group(group_logits, [rows[i] for i in indices], [positions[i] for i in indices], num_runners_up)
        for index, (token_id, others) in zip(indices, drawn, strict=True):
            token_ids[index], runners_up[index] = token_id, others
    return Draws(token_ids, runners_up)


def warped(logits: torch.Tensor, rows: Sequence[SamplingRow], *, limit: int | None = None) -> torch.Tensor:
    """The scores that `draw` adds its noise to: float32 [R, V], -inf for what it does not draw.

    Greedy rows are adjusted and nothing else. Arguments as for `draw`.
    """
    scores = _prepared(logits, rows)
    scores = scores.clone() if scores is logits else scores
    if limit is not None:
        scores[:, limit:] = float("-inf")
    for indices in _groups(rows, scores.shape[1]):
        group = [rows[index] for index in indices]
        if not group[0].is_greedy:
            found = _warped(scores[indices], group)
            kept = torch.full_like(scores[indices], float("-inf"))
            columns = found.token_ids_or_all().expand(len(indices), -1)
            scores[indices] = kept.scatter(1, columns, found.scores)
    return scores


def _prepared(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """``logits`` with each row adjusted, and without what may not be drawn; a copy unless there is nothing to do."""
    if all(row.adjustment is None and row.allowed is None for row in rows):
        return logits
    scores = logits
    if any(row.adjustment is not None for row in rows):
        scores = adjusted(logits, [row.adjustment for row in rows])
    return exclude(scores, [row.allowed for row in rows], logits)


def _groups(rows: Sequence[SamplingRow], vocab_size: int) -> Iterator[list[int]]:
    """Indices of rows that are drawn alike: all greedy, or with one top-k, top-p and min-p."""
    alike: dict[tuple[bool, int, float, float], list[int]] = {}
    for index, row in enumerate(rows):
        key = (True, 0, 1.0, 0.0) if row.is_greedy else (False, row.top_k, row.top_p, row.min_p)
        alike.setdefault(key, []).append(index)
    num_rows = max(1, _MAX_NOISE_ELEMENTS // vocab_size)
    for indices in alike.values():
        for start in range(0, len(indices), num_rows):
            yield indices[start : start + num_rows]


def _draw_group(
    logits: torch.Tensor, rows: Sequence[SamplingRow], positions: Sequence[int], num_runners_up: int
) -> Iterator[tuple[int, list[RunnerUp]]]:
    if rows[0].is_greedy:
        found, scores = Candidates(logits, None), logits
    else:
        found = _warped(logits, rows)
        scores = _noise([row.seed for row in rows], positions, found, logits.shape[1]) + found.scores
    if not num_runners_up:
        return ((ids[0], []) for ids in found.token_ids_at(scores.argmax(-1, keepdim=True)))
    best, columns = scores.topk(min(num_runners_up + 1, scores.shape[1]))
    best_ids, best_scores = found.token_ids_at(columns), best.tolist()
    if any(len(top) > 1 and not top[0] > top[1] for top in best_scores):
        # The drawn token is argmax's: on a tie topk may put another one first, and the rule is the lowest id.
        token_ids = [ids[0] for ids in found.token_ids_at(scores.argmax(-1, keepdim=True))]
    else:
        token_ids = [ids[0] for ids in best_ids]
    return (
        (token_id, _runners_up(token_id, ids, top)[:num_runners_up])
        for token_id, ids, top in zip(token_ids, best_ids, best_scores, strict=True)
    )


def _noise(seeds: Sequence[int], positions: Sequence[int], found: Candidates, vocab_size: int) -> torch.Tensor:
    """Of the candidates, float64 [R, C]; not to be changed."""
    if found.token_ids is None:
        return gumbel_of_all(seeds, positions, vocab_size, found.scores.device)
    if is_made_ahead(len(seeds), vocab_size):
        return gumbel_of_all(seeds, positions, vocab_size, found.scores.device).gather(1, found.token_ids)
    return gumbel(seeds, positions, found.token_ids)


def _warped(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Candidates:
    """What rows of one group, none of them greedy, may draw, and the scores that the noise is added to."""
    temperatures = torch.tensor([[row.temperature] for row in rows], dtype=torch.float32, device=logits.device)
    return candidates(logits / temperatures, rows[0].top_k, rows[0].top_p, rows[0].min_p)


def _runners_up(token_id: int, best_ids: Sequence[int], best_scores: Sequence[float]) -> list[RunnerUp]:
    top = best_scores[0]
    return [
        RunnerUp(other, top - score)
        for other, score in zip(best_ids, best_scores, strict=True)
        if other != token_id and score > float("-inf")
    ]
