"""The shape of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.events import FinishedEvent, TokenPiece
from coordinator.http.logprobs import TokenTexts, chat_logprobs
from coordinator.http.shapes import Answer, Json, reasons


class ChatShape:
    """A `coordinator.http.shapes.Shape`."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str, pieces: Sequence[TokenPiece], offset: int) -> Json:
        logprobs = chat_logprobs(pieces, self._texts)
        return {"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}

    def ending(self, index: int, end: FinishedEvent) -> Json:
        return {"index": index, "delta": {}, "logprobs": None, **reasons(end)}

    def whole(self, answer: Answer, end: FinishedEvent) -> Json:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = chat_logprobs(answer.pieces, self._texts)
        return {"index": answer.index, "message": message, "logprobs": logprobs, **reasons(end)}
