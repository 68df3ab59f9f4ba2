"""How often drafted tokens are right, by how sure the drafter said it was; learned at the target.

By depth alone every chain of a session looks alike. The drafter knows more: close draws are right every other time,
others nearly always (`speculation.guesses`). What is behind an unsure token is often verified for nothing, and with
many sessions there is better use for its row.

What a drafter says is not believed but calibrated: its numbers only sort its tokens into ranges, and each range has the
chance at which its tokens turned out right. A drafter that says nothing, or the same of all, has the usual chances.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

EDGES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Borders of the ranges of confidences."""

PRIOR_WEIGHT = 8.0
"""Tokens that the prior counts for in each range: few, as a drafter always wrong and always sure is found out by
the first token of a step alone. With 16 it had 227 wrong tokens verified in 96 steps after a good one, with 8 163."""

SESSION_WINDOW = 256.0
"""Tokens behind a session's estimate in one range, exponentially weighted."""

WORKER_WINDOW = 4096.0
"""The same for a worker's."""


class ConfidenceStatistics:
    """Chances of drafted tokens by range of confidence."""

    def __init__(self, prior: ConfidenceStatistics | None = None) -> None:
        """Starts from ``prior``'s estimates and passes its own observations on to it."""
        self._prior = prior
        self._decay = 1.0 - 1.0 / (WORKER_WINDOW if prior is None else SESSION_WINDOW)
        self._num_seen = [0.0] * (len(EDGES) + 1)
        self._num_right = [0.0] * (len(EDGES) + 1)

    def observe(self, confidence: float, is_right: bool) -> None:
        """A token of which ``confidence`` was said was the target's or not, everything before it being right."""
        index = bisect_right(EDGES, confidence)
        self._num_seen[index] = self._num_seen[index] * self._decay + 1.0
        self._num_right[index] = self._num_right[index] * self._decay + is_right
        if self._prior is not None:
            self._prior.observe(confidence, is_right)

    def survival(self, confidences: Sequence[float | None], usual: Sequence[float]) -> tuple[float, ...]:
        """P(the first d drafted tokens are accepted) for d = 1 .. ``len(usual)``; never rising.

        ``confidences`` are those of the first tokens, which are here; ``usual`` is the same as the result, of no tokens
        in particular, and says how it goes on behind them.
        """
        survival, reached, usually_reached = [], 1.0, 1.0
        for index, usually in enumerate(usual):
            rate = usually / usually_reached if usually_reached else 0.0
            confidence = confidences[index] if index < len(confidences) else None
            reached *= rate if confidence is None else self._chance(bisect_right(EDGES, confidence), rate)
            survival.append(reached)
            usually_reached = usually
        return tuple(survival)

    def _chance(self, index: int, usual: float) -> float:
        expected = usual if self._prior is None else self._prior._chance(index, usual)
        return (self._num_right[index] + PRIOR_WEIGHT * expected) / (self._num_seen[index] + PRIOR_WEIGHT)
