"""A language model as a pure function, and drafters that agree with it more or less."""

from __future__ import annotations

from collections.abc import Sequence

from speculation.fingerprint import fingerprint, mix64

VOCAB_SIZE = 11
STOP_TOKEN = 0


def next_token(prefix: Sequence[int], salt: int = 0) -> int:
    """What the toy target says after ``prefix``: always the same, and about once in 44 tokens the stop token."""
    noise = mix64(fingerprint(prefix) + salt)
    return STOP_TOKEN if noise % 44 == 0 else 1 + noise % (VOCAB_SIZE - 1)


def guess_token(prefix: Sequence[int], percent_right: int, salt: int = 0) -> int:
    """What a toy drafter says: the target's token in about ``percent_right`` of the prefixes."""
    luck = mix64(fingerprint(prefix) ^ 0xD4AF7)
    right = next_token(prefix, salt)
    return right if luck % 100 < percent_right else (right + 1 + luck % (VOCAB_SIZE - 1)) % VOCAB_SIZE


def plain_decoding(prompt: Sequence[int], max_length: int, salt: int = 0) -> list[int]:
    """The reference: one token at a time, stop token included."""
    tokens = list(prompt)
    while len(tokens) < max_length:
        tokens.append(next_token(tokens, salt))
        if tokens[-1] == STOP_TOKEN:
            break
    return tokens[len(prompt) :]
