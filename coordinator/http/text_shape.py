"""The shape of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.events import FinishedEvent, TokenPiece
from coordinator.http.logprobs import TokenTexts, completion_logprobs
from coordinator.http.shapes import Answer, Json, reasons


class TextShape:
    """A `coordinator.http.shapes.Shape`."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def opening(self, index: int) -> Json | None:
        return None

    def delta(self, index: int, text: str, pieces: Sequence[TokenPiece], offset: int) -> Json:
        logprobs = completion_logprobs(pieces, offset, self._texts)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def ending(self, index: int, end: FinishedEvent) -> Json:
        return {"index": index, "text": "", "logprobs": None, **reasons(end)}

    def whole(self, answer: Answer, end: FinishedEvent) -> Json:
        return {**self.delta(answer.index, answer.text, answer.pieces, 0), **reasons(end)}
