"""Tokens likely to come because they came before: what the target verifies where the drafter's tokens end.

Where the last tokens stood earlier in the sequence, what followed them there often follows again: in code, quotations,
in answers that edit or extract (prompt lookup decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). It
is found beside the model, in microseconds, so it is there when nothing else is: in the steps after a miss, while new
drafts are on their way. Like drafted tokens it is a hint. What it is worth is learned by the length of the match, also
from guesses that no step verified: the target's next tokens say whether they were right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from speculation.acceptance import DEPLOYMENT_WINDOW_STEPS, AcceptanceProfile
from speculation.messages import TokenId

MAX_MATCH = 5
"""Tokens that are compared at most. On the demo pair eight find nothing better than five, two 9 % less."""

_FIRST_BLOCK = 1024
"""Tokens at the end that are searched first."""


class LookedUp(NamedTuple):
    """What may follow, and how many last tokens were found there."""

    token_ids: tuple[TokenId, ...] = ()
    match_length: int = 0


NOTHING = LookedUp()


class LookupStatistics:
    """How many of the tokens looked up are right, by the length of the match."""

    def __init__(self, prior: LookupStatistics | None = None) -> None:
        """Starts from ``prior``'s estimates and passes its own observations on to it."""
        self._prior = prior
        self._profiles: dict[int, AcceptanceProfile] = {}  # by length of the match

    def observe(self, match_length: int, num_guessed: int, num_right: int) -> None:
        """Of ``num_guessed`` tokens whose truth is known the first ``num_right`` were right."""
        self._profile(match_length).observe(num_guessed, num_right)
        if self._prior is not None:
            self._prior.observe(match_length, num_guessed, num_right)

    def chances(self, looked_up: LookedUp) -> tuple[float, ...]:
        """P(the first d tokens are right) for d = 1, 2, ...; never rising."""
        return self._profile(looked_up.match_length).survival(len(looked_up.token_ids))

    def _profile(self, match_length: int) -> AcceptanceProfile:
        profile = self._profiles.get(match_length)
        if profile is None:
            if self._prior is None:
                profile = AcceptanceProfile(window_steps=DEPLOYMENT_WINDOW_STEPS)
            else:
                profile = AcceptanceProfile(self._prior._profile(match_length))
            self._profiles[match_length] = profile
        return profile


class PromptLookup:
    """Looks up the end of one session's sequence in all that precedes it."""

    def __init__(self, statistics: LookupStatistics) -> None:
        """``statistics`` are the worker's: the session starts from them and adds to them."""
        self._statistics = LookupStatistics(statistics)
        self._tokens = np.empty(0, dtype=np.int32)  # the committed ones, and room for more
        self._num_known = 0

    def find(self, committed: Sequence[TokenId], ahead: Sequence[TokenId], num_tokens: int) -> LookedUp:
        """Up to ``num_tokens`` tokens that may follow ``committed`` and ``ahead``.

        They are what followed the longest match, the latest one of equals. ``committed`` only ever grows from call to
        call. At most O(committed), 80 us for 131 thousand tokens; the last thousand suffice where they have a match of
        `MAX_MATCH`, for 30 us.
        """
        stop = len(committed) + len(ahead)
        if num_tokens <= 0 or stop < 2:
            return NOTHING
        self._follow(committed, stop + num_tokens)
        tokens = self._tokens
        tokens[len(committed) : stop] = ahead
        match_length, start = self._longest_match(stop)
        if not match_length:
            return NOTHING
        for index in range(num_tokens):  # what is found may be read again: a loop goes on for ever
            tokens[stop + index] = tokens[start + index]
        return LookedUp(tuple(tokens[stop : stop + num_tokens].tolist()), match_length)

    def _longest_match(self, stop: int) -> tuple[int, int]:
        """Its length, and where what followed it begins; in blocks from the end, each twice as long as the last."""
        best, start = 0, 0
        upper, size = stop - 1, _FIRST_BLOCK
        while upper > 0 and best < MAX_MATCH:
            lower = max(0, upper - size)
            length, end = self._longest_match_within(lower, upper, stop)
            if length > best:
                best, start = length, end + 1
            upper, size = lower, 2 * size
        return best, start

    def _longest_match_within(self, lower: int, upper: int, stop: int) -> tuple[int, int]:
        """The latest of the longest matches that end in [lower, upper): length and last token; length 0: none."""
        tokens = self._tokens
        ends = lower + np.flatnonzero(tokens[lower:upper] == tokens[stop - 1])
        if not ends.size:
            return 0, 0
        length = 1
        while length < MAX_MATCH:
            longer = ends[ends >= length]
            longer = longer[tokens[longer - length] == tokens[stop - 1 - length]]
            if not longer.size:
                break
            ends, length = longer, length + 1
        return length, int(ends[-1])

    def _follow(self, committed: Sequence[TokenId], num_needed: int) -> None:
        if num_needed > len(self._tokens):
            grown = np.empty(2 * num_needed, dtype=np.int32)
            grown[: self._num_known] = self._tokens[: self._num_known]
            self._tokens = grown
        self._tokens[self._num_known : len(committed)] = committed[self._num_known :]
        self._num_known = len(committed)

    def chances(self, looked_up: LookedUp) -> tuple[float, ...]:
        """P(the first d tokens are right, given that all before them are) for d = 1, 2, ...; never rising."""
        return self._statistics.chances(looked_up)

    def observe(self, looked_up: LookedUp, token_ids: Sequence[TokenId]) -> None:
        """The target said ``token_ids`` at the places of ``looked_up``, fewer or more than those."""
        num_known = min(len(looked_up.token_ids), len(token_ids))
        num_right = 0
        while num_right < num_known and looked_up.token_ids[num_right] == token_ids[num_right]:
            num_right += 1
        self._statistics.observe(looked_up.match_length, num_known, num_right)
