"""The two shapes of an answer: text completions and chat completions, whole and in chunks."""

from __future__ import annotations

from typing import Protocol

Json = dict[str, object]


class Shape(Protocol):
    """How OpenAI names the parts of one kind of answer."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, index: int) -> Json | None:
        """The choice that begins a stream, before any text; None: there is none."""
        ...

    def delta(self, index: int, text: str, finish_reason: str | None) -> Json:
        """A choice of a chunk: more text, or the end."""
        ...

    def whole(self, index: int, text: str, finish_reason: str) -> Json:
        """A choice of an answer that is not streamed."""
        ...


class TextShape:
    """``/v1/completions``."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def opening(self, index: int) -> Json | None:
        return None

    def delta(self, index: int, text: str, finish_reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def whole(self, index: int, text: str, finish_reason: str) -> Json:
        return self.delta(index, text, finish_reason)


class ChatShape:
    """``/v1/chat/completions``."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str, finish_reason: str | None) -> Json:
        delta = {"content": text} if finish_reason is None else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def whole(self, index: int, text: str, finish_reason: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}
