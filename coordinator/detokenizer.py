"""Text from token ids, one at a time, never half a character.

The pieces that `Detokenizer.push` and `Detokenizer.flush` return make, in order, the text that decoding all ids at
once gives, with two exceptions named at `_WindowDetokenizer`. Special tokens have no text.

``tokenizers.decoders.DecodeStream`` is not used: it holds text back for as long as it ends in U+FFFD, so bytes that
never become a character (or a model that writes U+FFFD itself) would silence the stream for ever, and it raises when
earlier text changes.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Mapping
from functools import cache, lru_cache
from typing import Protocol

from tokenizers import Tokenizer, decoders
from tokenizers.pre_tokenizers import ByteLevel

MAX_HELD_TOKENS = 8
"""Longest a token's text is held back; a character is at most 4 bytes, so at most 4 byte tokens."""

_WORD_START = "▁"
"""How SentencePiece writes a space."""

_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Incremental decoding of one sequence."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished. Unknown ids have no text."""
        ...

    def flush(self) -> str:
        """What is still held back, unfinished characters as U+FFFD. The sequence is over."""
        ...


def detokenizers(tokenizer: Tokenizer) -> Callable[[], Detokenizer]:
    """A maker of detokenizers that share what can be shared: one per tokenizer, one call per sequence."""
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        token_bytes = _token_bytes(tokenizer)
        return lambda: _ByteDetokenizer(token_bytes)
    special, fallback_bytes = _special_ids(tokenizer), _fallback_bytes(tokenizer)
    return lambda: _WindowDetokenizer(tokenizer, special, fallback_bytes)


@lru_cache(maxsize=4)  # one model is served, for a moment two
def bytes_of_tokens(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """The bytes that each token stands for, on its own; of special tokens their names. Unknown ids have none."""
    special = _special_ids(tokenizer)
    is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    ordinary = _token_bytes(tokenizer) if is_byte_level else _written_bytes(tokenizer)

    def bytes_of(token_id: int) -> bytes:
        return (tokenizer.id_to_token(token_id) or "").encode() if token_id in special else ordinary(token_id)

    return bytes_of


def _written_bytes(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """By the token's own string: decoding a token alone would take away the space that it begins with."""
    fallback_bytes = _fallback_bytes(tokenizer)

    def written_bytes(token_id: int) -> bytes:
        if token_id in fallback_bytes:
            return bytes([fallback_bytes[token_id]])
        return (tokenizer.id_to_token(token_id) or "").replace(_WORD_START, " ").encode()

    return written_bytes


class _ByteDetokenizer:
    """For byte-level BPE: every token is some bytes, and bytes decode incrementally. Exact, and O(1) per token."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def _token_bytes(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    special = _special_ids(tokenizer)
    byte_of_char = _byte_of_char()

    @cache  # bounded by the vocabulary
    def token_bytes(token_id: int) -> bytes:
        token = tokenizer.id_to_token(token_id)
        if token is None or token_id in special:
            return b""
        if all(char in byte_of_char for char in token):
            return bytes(byte_of_char[char] for char in token)
        return token.encode()  # an added token that holds plain text; the library's decoder does the same

    return token_bytes


def _fallback_bytes(tokenizer: Tokenizer) -> Mapping[int, int]:
    """The bytes that tokens of byte fallback, ``<0x00>`` to ``<0xFF>``, stand for; empty if there are none."""
    token_ids = {byte: tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return {token_id: byte for byte, token_id in token_ids.items() if token_id is not None}


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's mapping of the 256 bytes to printable characters, inverted."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    mapping = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    mapping.update({chr(256 + index): byte for index, byte in enumerate(others)})
    assert set(mapping) == set(ByteLevel.alphabet())
    return mapping


class _WindowDetokenizer:
    """For any other tokenizer: decodes a window of recent tokens, and what follows the part already given is new.

    The window starts one piece back, so that decoders which treat the first token specially (a stripped space) see a
    token before the new ones. Text that ends in U+FFFD is held back, at most `MAX_HELD_TOKENS` tokens, unless it is
    that very character, spelt in bytes.

    Differs from decoding all at once only where a decoder rewrites text given before: byte tokens that never become a
    character (Llama's byte fallback turns a whole run of them into U+FFFD when one is wrong).
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: Collection[int], fallback_bytes: Mapping[int, int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._fallback_bytes = fallback_bytes
        self._window: list[int] = []
        self._num_given = 0  # tokens of the window whose text has been given
        self._given = ""  # their text

    def push(self, token_id: int) -> str:
        if token_id in self._special_ids:  # they have no text; a window full of them would only grow
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and self._may_become_a_character():
            return ""
        return self._give(text)

    def _may_become_a_character(self) -> bool:
        held = self._window[self._num_given :]
        return len(held) < MAX_HELD_TOKENS and not self._ends_in_whole_characters(held)

    def _ends_in_whole_characters(self, held: list[int]) -> bool:
        """Whether the last tokens are bytes, and these are whole characters."""
        spelt: list[int] = []
        for token_id in reversed(held):
            if token_id not in self._fallback_bytes:
                break
            spelt.insert(0, self._fallback_bytes[token_id])
        try:
            bytes(spelt).decode()
        except UnicodeDecodeError:
            return False
        return bool(spelt)

    def flush(self) -> str:
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        piece = text[len(self._given) :]
        if piece:  # a token without text must not push the last real one out of the window
            del self._window[: self._num_given]
            self._num_given = len(self._window)
            self._given = self._decode(self._window)
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
