"""Logprobs in OpenAI's two shapes: parallel lists for completions, a list of objects for chats."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from coordinator.detokenizer import bytes_of_tokens
from coordinator.events import TokenPiece
from coordinator.http.shapes import Json
from speculation.messages import TokenId

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's own choice."""


class TokenTexts:
    """What tokens are called: their own text, or their bytes where these are no text by themselves."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = bytes_of_tokens(tokenizer)

    def bytes_of(self, token_id: TokenId) -> bytes:
        return self._bytes_of(token_id)

    def text_of(self, token_id: TokenId) -> str:
        content = self._bytes_of(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:  # a part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def completion_logprobs(pieces: Sequence[TokenPiece], offset: int, texts: TokenTexts) -> Json | None:
    """``offset``: characters of the completion before these tokens."""
    known = [(piece, piece.logprobs) for piece in pieces if piece.logprobs is not None]
    if not known:
        return None
    offsets = []
    for piece, _ in known:
        offsets.append(offset)
        offset += len(piece.text)
    return {
        "tokens": [texts.text_of(piece.token_id) for piece, _ in known],
        "token_logprobs": [finite(logprobs.logprob) for _, logprobs in known],
        "top_logprobs": [
            {texts.text_of(token_id): finite(value) for token_id, value in logprobs.top} for _, logprobs in known
        ],
        "text_offset": offsets,
    }


def chat_logprobs(pieces: Sequence[TokenPiece], texts: TokenTexts) -> Json | None:
    known = [(piece, piece.logprobs) for piece in pieces if piece.logprobs is not None]
    if not known:
        return None
    content = [
        {
            **_named(piece.token_id, logprobs.logprob, texts),
            "top_logprobs": [_named(token_id, value, texts) for token_id, value in logprobs.top],
        }
        for piece, logprobs in known
    ]
    return {"content": content, "refusal": None}


def finite(logprob: float) -> float:
    return max(logprob, LEAST)


def _named(token_id: TokenId, logprob: float, texts: TokenTexts) -> Json:
    return {
        "token": texts.text_of(token_id),
        "logprob": finite(logprob),
        "bytes": list(texts.bytes_of(token_id)),
    }
