"""What a worker's engine looks like to whoever carries its messages: the gRPC servicer, or a test in process.

`WorkerCore` is structural: ``draft_worker`` and ``target_worker`` implement it over a model thread, the doubles in
``tests/doubles`` without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from speculation.messages import NOTHING_HEARD, Heard, ModelInfo, SessionId

CommandT = TypeVar("CommandT")
CommandT_contra = TypeVar("CommandT_contra", contravariant=True)
FrameT = TypeVar("FrameT")
FrameT_co = TypeVar("FrameT_co", covariant=True)


class Connection(Protocol[CommandT_contra]):
    """One coordinator's sessions at a worker. Session ids belong to the connection."""

    def submit(self, items: Sequence[tuple[SessionId, CommandT_contra]], heard: Heard = NOTHING_HEARD) -> None:
        """Applies commands in order; never blocks. Called on the event loop.

        ``heard`` is what the coordinator had had of this worker when it sent them.
        """
        ...

    def close(self) -> None:
        """Drops all sessions of the connection within one step; nothing is delivered afterwards. Idempotent."""
        ...


class WorkerCore(Protocol[CommandT_contra, FrameT_co]):
    """A model that is loaded and running."""

    @property
    def model_info(self) -> ModelInfo: ...

    @property
    def tokenizer_json(self) -> bytes: ...

    def connect(self, deliver: Callable[[FrameT_co], None]) -> Connection[CommandT_contra]:
        """A new connection; ``deliver`` is called on the event loop, at most once per step, and never blocks."""
        ...
