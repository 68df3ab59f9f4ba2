"""Which drafted tokens to keep, by the ratio of the target's probability to the drafter's: the other exact rules.

The coupled rule (`speculation.verifier`) compares tokens and knows no probability. These two compare probabilities, of
many sessions at once, given the noise as numbers:

- `rejection`: each drafted token x, drawn from q, stays with probability min(1, p(x) / q(x)). At the first that does
  not, the target's own token is drawn from norm(max(0, p - q)) (Leviathan et al., arXiv 2211.17192, algorithm 1).
- `block`: how many stay is decided for the whole chain together, which keeps as many or more on average (Sun et al.,
  arXiv 2403.10444, algorithm 2). The own token is drawn from norm(max(0, P p - q)), P being what is left of the ratio.

If all stay the own token is drawn from p. Should the session have another drafted token staged right there, that one is
tried first, by the rejection rule: the row of p is at hand, the own token has distribution p either way, and the chain
behind the staged token goes on being of use. Without that nearly every full acceptance would throw away what is staged.

The distribution of what is committed is the target's if (1) each drafted token was drawn from the q that came with it,
(2) whether it was there in time did not depend on which token it was, and (3) no random number is used twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DraftedRows:
    """Staged tokens of S sessions, at most D of each, each drawn from at most C candidates; the rest is padding.

    A session's first ``num_drafted`` rows are what the step verifies; one more may be staged behind them.
    """

    p: Floats
    """[S, D, C]: the target's probabilities of the drafter's candidates; 0 in the padding."""
    q: Floats
    """[S, D, C]: the drafter's; 0 in the padding."""
    columns: Integers
    """[S, D]: which of its candidates was drafted."""
    num_drafted: Integers
    """[S]"""
    num_rows: Integers
    """[S]: ``num_drafted``, or one more."""
    uniforms: Floats
    """[S, D], strictly inside (0, 1), for this step and no other."""

    def drafted(self, probabilities: Floats) -> Floats:
        """[S, D]: those of the drafted tokens, out of `p` or `q`."""
        return np.take_along_axis(probabilities, self.columns[..., None], axis=2)[..., 0]

    def is_drafted(self) -> npt.NDArray[np.bool_]:
        """[S, D]: the step verifies this row."""
        depths = np.arange(self.columns.shape[1])
        found: npt.NDArray[np.bool_] = depths < self.num_drafted[:, None]
        return found


@dataclass(frozen=True, slots=True)
class Decision:
    """What stays, and what the own token is drawn from."""

    num_kept: Integers
    """[S]: staged tokens that stay. One more than were verified: the own token is the one staged behind them."""
    scales: Floats
    """[S]: the own token is drawn from norm(max(0, scale p - q)) of row ``num_kept``; 0: from p, as there is no q."""


Rule: TypeAlias = Callable[[DraftedRows], Decision]
"""Looks at the verified rows only."""


def decide(rule: Rule, rows: DraftedRows) -> Decision:
    """Applies ``rule``, then tries the token staged behind a chain that was kept whole."""
    decision = rule(rows)
    sessions = np.flatnonzero((decision.num_kept == rows.num_drafted) & (rows.num_rows > rows.num_drafted))
    depths = rows.num_drafted[sessions]
    p, q = rows.drafted(rows.p)[sessions, depths], rows.drafted(rows.q)[sessions, depths]
    stays = rows.uniforms[sessions, depths] * q < p
    num_kept, scales = decision.num_kept.copy(), decision.scales.copy()
    num_kept[sessions] += stays
    scales[sessions] = np.where(stays, 0.0, 1.0)
    return Decision(num_kept, scales)


def rejection(rows: DraftedRows) -> Decision:
    """Token by token: up to the first whose uniform number is not below p / q."""
    stays = (rows.uniforms * rows.drafted(rows.q) < rows.drafted(rows.p)) & rows.is_drafted()
    num_kept = np.logical_and.accumulate(stays, axis=1).sum(axis=1)
    return Decision(num_kept, np.where(num_kept < rows.num_drafted, 1.0, 0.0))


def block(rows: DraftedRows) -> Decision:
    """The longest beginning of the chain whose uniform number is below what it may be kept with."""
    num_sessions, num_depths = rows.columns.shape
    p, q = rows.drafted(rows.p), rows.drafted(rows.q)
    left = np.ones(num_sessions)  # P of the paper: the ratio of the whole beginning, never above 1
    num_kept = np.zeros(num_sessions, dtype=np.int64)
    scales = np.ones(num_sessions)
    for depth in range(num_depths):
        left = np.minimum(left * p[:, depth] / np.where(q[:, depth] > 0, q[:, depth], 1.0), 1.0)
        is_last = rows.num_drafted == depth + 1
        following = min(depth + 1, num_depths - 1)  # of the last row there is none, and it is not looked at
        chance = np.where(is_last, left, _chance_to_end(left, rows.p[:, following], rows.q[:, following]))
        stays = (rows.uniforms[:, depth] < chance) & (depth < rows.num_drafted)
        num_kept, scales = np.where(stays, depth + 1, num_kept), np.where(stays, left, scales)
    return Decision(num_kept, np.where(num_kept < rows.num_drafted, scales, 0.0))


def _chance_to_end(left: Floats, p: Floats, q: Floats) -> Floats:
    """[S]: with what probability a beginning stays if none that is longer does; ``p`` and ``q`` are behind it."""
    elsewhere = np.maximum(1.0 - p.sum(axis=-1), 0.0)  # the target's mass where the drafter has none
    residual = left * elsewhere + np.maximum(left[:, None] * p - q, 0.0).sum(axis=-1)
    missing = 1.0 - left
    chance: Floats = np.where(missing > 0, residual / np.where(missing > 0, residual + missing, 1.0), 1.0)
    return chance
