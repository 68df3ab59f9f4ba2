"""How the coordinator speaks to workers, whatever is in between.

One protocol for both kinds of worker, made by gRPC (`coordinator.grpc_clients`), in process
(`coordinator.in_process`) or a double in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, TypeVar

from rpc.draft_codec import DraftFrame
from speculation.messages import DraftCommand, ModelInfo, SessionId, TargetCommand, TargetFrame

CommandT = TypeVar("CommandT")
CommandT_contra = TypeVar("CommandT_contra", contravariant=True)
FrameT = TypeVar("FrameT")
FrameT_co = TypeVar("FrameT_co", covariant=True)

OnLost: TypeAlias = Callable[[Exception | None], None]


class WorkerConnection(Protocol[CommandT_contra]):
    """One stream of frames to a worker. When it ends, the worker drops all of its sessions."""

    def send(self, session_id: SessionId, command: CommandT_contra) -> None:
        """Queues a command; what is sent within one turn of the event loop goes out as one frame, in order.

        Never blocks and never raises: on a lost connection it does nothing, and ``on_lost`` tells.
        """
        ...

    async def close(self) -> None:
        """Ends the stream; ``on_lost`` is not called. Idempotent."""
        ...


class WorkerClient(Protocol[CommandT_contra, FrameT_co]):
    """One worker. May be connected again and again, one connection at a time."""

    @property
    def name(self) -> str:
        """For people and logs: the address."""
        ...

    async def describe(self) -> tuple[ModelInfo, bytes]:
        """What it serves, and its tokenizer.json (downloaded only if its digest is new).

        Raises `rpc.errors.OutriderError` if the worker cannot be reached or is still loading.
        """
        ...

    async def connect(
        self, on_frame: Callable[[FrameT_co], None], on_lost: OnLost
    ) -> WorkerConnection[CommandT_contra]:
        """Opens the stream and returns when the worker has accepted it.

        ``on_frame`` is called on the event loop for every frame, in order; ``on_lost`` once, when the stream ends
        other than by ``close``, and nothing is called after it. Raises as `describe`.
        """
        ...

    async def close(self) -> None:
        """Frees what the client holds, connections included. Idempotent."""
        ...


TargetClient: TypeAlias = WorkerClient[TargetCommand, TargetFrame]
DraftClient: TypeAlias = WorkerClient[DraftCommand, DraftFrame]
TargetConnection: TypeAlias = WorkerConnection[TargetCommand]
DraftConnection: TypeAlias = WorkerConnection[DraftCommand]
