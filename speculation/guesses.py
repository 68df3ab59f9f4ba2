"""How often the draft model's guesses are the target's tokens, by how sure it was; learned from commits.

A guess is a drawn token and its runners-up. How sure the draft model was is the *gap* between the two best scores
(logits over temperature, noise included): on the demo pair guesses with a gap below 0.5 are right in 45 to 63 % of all
cases, with one above 3 in 98 %, and of the missed tokens 57 to 72 % are the first runner-up, 16 to 19 % the second. So
the gap says both where a chain will end and which other token to have ready there.

Estimates are ratios of exponentially weighted counts per range of gaps; those of a session lean on its worker's, and
those of a new worker on what was measured on the demo pair.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from speculation.draft_distribution import DraftDistribution
from speculation.messages import TokenId

NUM_RUNNERS_UP = 2
"""Next best tokens that are looked at: a third one is the target's in 6 to 11 % of the misses."""

GAP_EDGES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Borders of the ranges of gaps."""

START_MISS = 0.5
"""Chance of a miss at gap 0 before anything is known; it falls by half every `START_HALVING` of gap."""

START_HALVING = 0.75

START_SHARES = (0.6, 0.2)
"""Shares of the misses in which the first and the second runner-up is right, before anything is known."""

PRIOR_WEIGHT = 16.0
"""Guesses that the prior counts for in each range: its estimate is then as good as that of so many own ones."""

SESSION_WINDOW = 256.0
"""Guesses behind a session's estimate in one range, exponentially weighted."""

WORKER_WINDOW = 4096.0
"""The same for a worker's."""


class RunnerUp(NamedTuple):
    """A token that was nearly drawn."""

    token_id: TokenId
    gap: float
    """By how much its score was below the drawn token's."""


class Guess(NamedTuple):
    """One drafted token with what was known when it was drawn."""

    token_id: TokenId
    gap: float
    """To the best runner-up; infinite if there is none."""
    runners_up: tuple[RunnerUp, ...]
    distribution: DraftDistribution | None = None
    """What it was drawn from, if the target needs to know."""


def guess_of(token_id: TokenId, runners_up: Sequence[tuple[TokenId, float]]) -> Guess:
    """A guess from a draw; ``runners_up`` are (token id, gap), best first."""
    found = tuple(RunnerUp(*one) for one in runners_up[:NUM_RUNNERS_UP])
    return Guess(token_id, found[0].gap if found else math.inf, found)


def guess_from(token_id: TokenId, distribution: DraftDistribution) -> Guess:
    """A guess that the target will judge by ``distribution``.

    It has the same chance as any other: when a draft leaves depends on what it is believed to be worth, and drafts that
    come sooner or later for what they are would bias what the target keeps.
    """
    return Guess(token_id, 0.0, (), distribution)


class GuessStatistics:
    """Chances of guesses and of their runners-up."""

    def __init__(self, prior: GuessStatistics | None = None) -> None:
        """Starts from ``prior``'s estimates and passes its own observations on to it."""
        self._prior = prior
        self._decay = 1.0 - 1.0 / (WORKER_WINDOW if prior is None else SESSION_WINDOW)
        num_ranges = len(GAP_EDGES) + 1
        self._num_seen = [0.0] * num_ranges
        self._num_hits = [[0.0] * num_ranges for _ in range(1 + NUM_RUNNERS_UP)]  # by rank; 0 is the guess itself

    def observe(self, guess: Guess, token_id: TokenId) -> None:
        """The target said ``token_id`` where ``guess`` was made, everything before it being right."""
        index = bisect_right(GAP_EDGES, guess.gap)
        tokens = (guess.token_id, *(one.token_id for one in guess.runners_up))
        self._count(index, tokens.index(token_id) if token_id in tokens else None)

    def _count(self, index: int, rank: int | None) -> None:
        self._num_seen[index] = self._num_seen[index] * self._decay + 1.0
        for hit_rank, hits in enumerate(self._num_hits):
            hits[index] = hits[index] * self._decay + (hit_rank == rank)
        if self._prior is not None:
            self._prior._count(index, rank)

    def chance(self, guess: Guess) -> float:
        """P(the guess is the target's token, given that everything before it is)."""
        return self._chance(0, bisect_right(GAP_EDGES, guess.gap))

    def runner_up_chances(self, guess: Guess) -> tuple[float, ...]:
        """For each runner-up: P(it is the target's token, given that everything before it is)."""
        index = bisect_right(GAP_EDGES, guess.gap)
        return tuple([self._chance(rank, index) for rank in range(1, 1 + len(guess.runners_up))])

    def _chance(self, rank: int, index: int) -> float:
        expected = _start_chance(rank, index) if self._prior is None else self._prior._chance(rank, index)
        hits, seen = self._num_hits[rank][index], self._num_seen[index]
        return (hits + PRIOR_WEIGHT * expected) / (seen + PRIOR_WEIGHT)


def _start_chance(rank: int, index: int) -> float:
    low = GAP_EDGES[index - 1] if index else 0.0
    miss: float = START_MISS * 0.5 ** (low / START_HALVING)
    return 1.0 - miss if rank == 0 else miss * START_SHARES[rank - 1]
