"""How the next token of a line is drawn: with the target's noise, or from a distribution that goes along with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from grammar import Mask
from inference import SamplingRow, SequenceRows, draw, pick, truncated_weights, warped
from speculation.draft_distribution import WEIGHT_BITS, DraftDistribution
from speculation.draft_lines import DraftLine
from speculation.drafter import DrafterSession
from speculation.guesses import NUM_RUNNERS_UP, Guess, guess_from, guess_of
from speculation.messages import TokenId


@dataclass(frozen=True, slots=True)
class LineEnd:
    """Where one token is to be drawn."""

    drafter: DrafterSession
    line: DraftLine
    rows: SequenceRows
    mask: Mask = None
    """What a grammar allows there."""
    looked_up: tuple[TokenId, ...] = ()
    """Behind the line, and before the token."""

    def row(self) -> SamplingRow:
        """How the token is drawn."""
        row = self.rows.fixed or self.rows.row(
            self.drafter.committed, [*self.drafter.ahead(self.line), *self.looked_up]
        )
        if self.mask is not None:
            row = row.with_allowed(self.mask)
        takes_best = self.drafter.sampling.by_ratio and not self.drafter.sampling.needs_q
        return replace(row, temperature=0.0) if takes_best else row

    @property
    def position(self) -> int:
        return self.drafter.position(self.line) + len(self.looked_up)


Draw: TypeAlias = Callable[[Tensor, Sequence[LineEnd], int], Sequence[Guess]]


def draw_guesses(logits: Tensor, ends: Sequence[LineEnd], vocab_size: int) -> list[Guess]:
    """One guess per row of ``logits``, float32 [R, V]; only ids below ``vocab_size`` are drawn."""
    if not any(end.drafter.sampling.needs_q for end in ends):
        return _with_target_noise(logits, ends, vocab_size)
    ways: dict[int, list[int]] = {}  # by the length of q; 0: there is none
    for index, end in enumerate(ends):
        sampling = end.drafter.sampling
        ways.setdefault(sampling.draft_top_n if sampling.needs_q else 0, []).append(index)
    guesses: dict[int, Guess] = {}
    for top_n, indices in ways.items():
        draw_some: Draw = _from_distribution if top_n else _with_target_noise
        rows = logits if len(indices) == len(ends) else logits[indices]
        guesses.update(zip(indices, draw_some(rows, [ends[index] for index in indices], vocab_size), strict=True))
    return [guesses[index] for index in range(len(ends))]


def _with_target_noise(logits: Tensor, ends: Sequence[LineEnd], vocab_size: int) -> list[Guess]:
    rows = [end.row() for end in ends]
    positions = [end.position for end in ends]
    draws = draw(logits, rows, positions, limit=vocab_size, num_runners_up=NUM_RUNNERS_UP)
    return [guess_of(*one) for one in zip(draws.token_ids, draws.runners_up, strict=True)]


def _from_distribution(logits: Tensor, ends: Sequence[LineEnd], vocab_size: int) -> list[Guess]:
    """All of one ``draft_top_n``.

    The noise belongs to everything before the token, and not to its position alone: a chain that was refused is drawn
    again behind another token, and what the target has learned from the first draw must say nothing of the second.
    """
    scores = warped(logits, [end.row() for end in ends], limit=vocab_size)
    token_ids, weights = truncated_weights(scores, ends[0].drafter.sampling.draft_top_n, WEIGHT_BITS)
    seeds = [end.drafter.sampling.seed ^ end.drafter.fingerprint(end.line) for end in ends]
    columns = pick(weights, seeds, [end.position for end in ends], WEIGHT_BITS).tolist()
    return [_guess(*row) for row in zip(token_ids.tolist(), weights.tolist(), columns, strict=True)]


def _guess(token_ids: Sequence[int], weights: Sequence[int], column: int) -> Guess:
    kept = [index for index, weight in enumerate(weights) if weight]
    distribution = DraftDistribution(tuple(token_ids[i] for i in kept), tuple(weights[i] for i in kept))
    return guess_from(token_ids[column], distribution)
