"""Stop strings in text that comes in pieces: what may be given out already, and where the answer ends.

Text is held back while it may be the beginning of a stop string, so nothing of one, and nothing beyond it, is ever
given out (unless it is to stay in the answer). The first piece to complete a stop string decides; of several that one
piece completes, the one that begins first, so that none is left in what was given out. That does not depend on how
many tokens a step commits.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStringSearch:
    """Looks through the text of one answer. Without strings it holds nothing back."""

    def __init__(self, strings: Sequence[str], keeps_stop: bool) -> None:
        """``keeps_stop``: what is given out ends behind the stop string, not before it."""
        self._strings = tuple(strings)
        self._keeps_stop = keeps_stop
        self._held = ""

    def push(self, piece: str, counts: bool = True) -> tuple[str, str | None]:
        """The text that may be given out now, and the stop string that ``piece`` completed, if any.

        After a stop string there is no more to push. ``counts`` False: what this piece completes is no stop.
        """
        if not self._strings:
            return piece, None
        text = self._held + piece
        found = self._first_completed(text) if counts and piece else None
        if found is not None:
            start, string = found
            return text[: start + len(string) if self._keeps_stop else start], string
        num_given = len(text) - self._num_held(text)
        self._held = text[num_given:]
        return text[:num_given], None

    def flush(self) -> str:
        """What is still held back: the answer is over, so it was no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_completed(self, text: str) -> tuple[int, str] | None:
        """Where the first string begins that ends in the new piece."""
        num_old = len(self._held)
        found = [
            (start, string)
            for string in self._strings
            if (start := text.find(string, max(0, num_old - len(string) + 1))) >= 0
        ]
        return min(found, key=lambda item: item[0], default=None)

    def _num_held(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._strings)) - 1)
        for length in range(longest, 0, -1):
            if any(len(string) > length and text.endswith(string[:length]) for string in self._strings):
                return length
        return 0
