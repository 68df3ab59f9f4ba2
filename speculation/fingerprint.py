"""Content addresses of token prefixes.

``f(()) = EMPTY`` and ``f(prefix + t) = mix64(f(prefix) ^ mix64(t + TOKEN_OFFSET))`` with the finaliser of splitmix64
(Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014). Extending by one token costs the
same at any length, so every node of a draft tree can carry the fingerprint of everything before it. A collision
costs speed, never correctness: the target verifies token ids, not fingerprints.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NewType

Fingerprint = NewType("Fingerprint", int)

_MASK = (1 << 64) - 1
EMPTY = Fingerprint(0x6F75747269646572)  # "outrider" in ASCII
TOKEN_OFFSET = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit integers."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=1 << 16)
def _mixed_token(token_id: int) -> int:
    return mix64(token_id + TOKEN_OFFSET)


def extend(prefix: Fingerprint, token_id: int) -> Fingerprint:
    """Fingerprint of ``prefix`` followed by ``token_id``."""
    return Fingerprint(mix64(prefix ^ _mixed_token(token_id)))


def fingerprint(token_ids: Iterable[int]) -> Fingerprint:
    """Fingerprint of a whole sequence, O(length)."""
    result = EMPTY
    for token_id in token_ids:
        result = extend(result, token_id)
    return result
