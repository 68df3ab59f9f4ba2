"""What a drafter drew a token from, as it travels: whole-numbered weights of a few tokens.

A token has probability weight / `WEIGHT_TOTAL`, and the weights of a distribution add up to `WEIGHT_TOTAL` exactly. So
there is nothing to round and nothing to normalise on the way: the q that the target divides by is, bit for bit, the
one that the drafter drew from. A q that is nearly right would bias the output.
"""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT_BITS = 16

WEIGHT_TOTAL = 1 << WEIGHT_BITS
"""Fine enough: rounding to it moves less mass than what is cut off behind the best tokens does."""

MAX_DRAFT_TOP_N = 256
"""Most tokens that one distribution may hold: at most 6 bytes each on the wire with a vocabulary below 2**21."""


@dataclass(frozen=True, slots=True)
class DraftDistribution:
    """The tokens that could have been drawn, and their weights."""

    token_ids: tuple[int, ...]
    weights: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of ids and weights on the wire, as varints; the few bytes of protobuf's framing are not counted."""
        return sum(map(_varint_bytes, self.token_ids)) + sum(map(_varint_bytes, self.weights))

    def is_valid(self, token_id: int, vocab_size: int, max_tokens: int) -> bool:
        """Can ``token_id`` have been drawn from this, and is it a distribution over the vocabulary at all?"""
        ids = self.token_ids
        return (
            len(ids) == len(self.weights) <= max_tokens
            and len(set(ids)) == len(ids)
            and token_id in ids
            and max(ids) < vocab_size
            and min(self.weights) > 0
            and sum(self.weights) == WEIGHT_TOTAL
        )


def one_hot(token_id: int) -> DraftDistribution:
    """Of a token that was not drawn but chosen: the most likely one."""
    return DraftDistribution((token_id,), (WEIGHT_TOTAL,))


def _varint_bytes(value: int) -> int:
    return max(1, (value.bit_length() + 6) // 7)
