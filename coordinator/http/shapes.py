"""The two shapes of an answer: text completions and chat completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.events import FinishedEvent, TokenPiece

Json = dict[str, object]


@dataclass(slots=True)
class Answer:
    """One choice, as far as it has come."""

    index: int
    parts: list[str] = field(default_factory=list)
    pieces: list[TokenPiece] = field(default_factory=list)
    end: FinishedEvent | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Shape(Protocol):
    """How OpenAI names the parts of one kind of answer."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, index: int) -> Json | None:
        """The choice that begins a stream, before any text; None: there is none."""
        ...

    def delta(self, index: int, text: str, pieces: Sequence[TokenPiece], offset: int) -> Json:
        """A choice of a chunk: more text, which has ``offset`` characters before it."""
        ...

    def ending(self, index: int, end: FinishedEvent) -> Json:
        """The last choice of a stream."""
        ...

    def whole(self, answer: Answer, end: FinishedEvent) -> Json:
        """A choice of an answer that is not streamed."""
        ...


def reasons(end: FinishedEvent) -> Json:
    """Why it ended; ``stop_reason``, as vLLM has it, is the stop string or token of the request's own that did it."""
    return {"finish_reason": end.finish_reason.value, "stop_reason": end.stop_reason}
