"""Where one answer stands in its grammar, and what may follow, also along tokens that are only drafted."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TypeAlias

from llguidance import LLMatcher

from grammar.errors import GrammarError, shown
from speculation.messages import TokenId

Mask: TypeAlias = "bytes | None"
"""Bit ``i % 8`` (the lowest is 0) of byte ``i // 8`` says whether token ``i`` is allowed. None: every token is."""


def allowed_by(matcher: LLMatcher) -> bytes:
    """What may come where ``matcher`` stands. Raises `GrammarError` if nothing may, or to find out costs too much."""
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(shown(matcher.get_error()))
    if mask.count(0) == len(mask):
        raise GrammarError("no token can follow: the grammar leads nowhere from here")
    return mask


class GrammarPath:
    """Stands behind the committed tokens; looks ahead and comes back. A step costs about a microsecond.

    What is allowed is a function of the grammar and the tokens since the prompt alone, whatever was looked at before.
    After an end-of-text token everything is: the answer is over there, and nobody reads on.
    """

    def __init__(self, matcher: LLMatcher, end_token_ids: Set[TokenId], start: int) -> None:
        """``matcher`` stands at the start, which is position ``start`` of the sequence: the prompt's length."""
        self._matcher = matcher
        self._end_token_ids = end_token_ids
        self._position = start
        self._ahead: list[TokenId] = []
        """What the matcher has consumed beyond the committed tokens."""

    def follow(self, committed: Sequence[TokenId]) -> None:
        """``committed``: the whole sequence so far, prompt included. Raises `GrammarError` if it breaks the grammar."""
        new = committed[self._position :]
        self._move(new)
        if not self._ends(new) and len(self._ahead) < len(new):
            position = self._position + len(self._ahead)
            raise GrammarError(f"the token at position {position} is not allowed by the grammar")
        self._position = len(committed)
        self._ahead = []

    def num_allowed(self, ahead: Sequence[TokenId]) -> int:
        """How many of these tokens, in this order, may follow the committed ones."""
        self._move(ahead)
        count = len(self._ahead)
        ends_here = count < len(ahead) and ahead[count] in self._end_token_ids and self._matcher.is_accepting()
        return count + ends_here

    def masks(self, ahead: Sequence[TokenId]) -> list[Mask]:
        """What may come behind the committed tokens and ``ahead[:i]``, for ``i`` in ``[0, len(ahead)]``.

        ``ahead`` has to be allowed. Raises `GrammarError` if nothing may come, or to find out costs too much.
        """
        return [self.mask(ahead[:length]) for length in range(len(ahead) + 1)]

    def mask(self, ahead: Sequence[TokenId]) -> Mask:
        """The last of `masks`."""
        if self._ends(ahead):
            return None
        self._move(ahead)
        if len(self._ahead) < len(ahead):
            raise GrammarError(f"token {ahead[len(self._ahead)]} is not allowed by the grammar")
        return allowed_by(self._matcher)

    def _ends(self, ahead: Sequence[TokenId]) -> bool:
        return not self._end_token_ids.isdisjoint(ahead)

    def _move(self, ahead: Sequence[TokenId]) -> None:
        """Brings the matcher behind the committed tokens and as many of ``ahead`` as it may go.

        End-of-text tokens are never consumed: the library does not come back from behind them.
        """
        num_common = 0
        for token_id, wanted in zip(self._ahead, ahead, strict=False):
            if token_id != wanted:
                break
            num_common += 1
        if num_common < len(self._ahead):
            self._matcher.rollback(len(self._ahead) - num_common)
            del self._ahead[num_common:]
        rest = list(ahead[num_common:])
        for index, token_id in enumerate(rest):
            if token_id in self._end_token_ids:
                del rest[index:]
                break
        if rest:
            self._ahead += rest[: self._matcher.try_consume_tokens(rest)]
