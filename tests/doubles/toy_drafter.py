"""A drafter session driven by the toy model instead of a draft model."""

from __future__ import annotations

from speculation.draft_lines import DraftLine
from speculation.drafter import DrafterSession
from speculation.guesses import guess_of
from tests.doubles.toy_model import VOCAB_SIZE, guess_token, next_token


def draft_with_toy(drafter: DrafterSession, line: DraftLine, percent_right: int) -> None:
    """One more token of ``line``; where it is wrong the first runner-up is often right."""
    line.num_cached += len(drafter.uncached(line))
    prefix = drafter.sequence(line)
    token_id = guess_token(prefix, percent_right)
    right = next_token(prefix)
    first = right if right != token_id and len(prefix) % 3 else (token_id + 1) % VOCAB_SIZE
    others = [(first, 0.3), ((first + 1) % VOCAB_SIZE, 0.9)]
    drafter.drafted(line, guess_of(token_id, [one for one in others if one[0] != token_id]))
