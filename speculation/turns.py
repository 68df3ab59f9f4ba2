"""Draft, then verify: the classic way, as a mode of the same core, to be measured beside the stream.

A session that takes turns is in no verify step before the drafts of its turn are staged, and its coordinator gives the
drafter no more lookahead than K, so that nothing is drafted during verification. Sessions that take turns go together,
as the batches of engines that work like this do: while one lacks drafts all of them sit out, and sessions that stream
go on without them. Only a step that is run for a prompt takes everyone along.
"""

from __future__ import annotations

from dataclasses import dataclass

TURN_TIMEOUT_S = 2.0
"""A turn is over after so long, with what is staged by then, if only nothing: a hung drafter must not hold up a session
for ever. Far longer than drafting takes over any link, so it says nothing about the speed of taking turns."""

MIN_TURN_WAIT_S = 1e-3
"""Shortest wait asked for."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a session waits for before its next verify step."""

    num_wanted: int
    """Staged tokens that make the turn complete: K, or fewer where the sequence ends."""
    since_s: float
    """When the drafter's turn began: at the last verdict."""

    def wait_s(self, num_staged: int, now_s: float) -> float:
        """Longest time to wait from now on; 0 when the target's turn has come."""
        left_s = self.since_s + TURN_TIMEOUT_S - now_s
        return max(MIN_TURN_WAIT_S, left_s) if num_staged < self.num_wanted and left_s > 0 else 0.0
