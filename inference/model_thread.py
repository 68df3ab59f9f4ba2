"""One thread that owns all device state: commands come in by a queue, outputs go out by a callback.

Torch calls block, so they must not run on an event loop; and a KV pool is no place for locks. The thread takes all
commands that have come, lets the engine apply them, runs one step, delivers the outputs, and blocks exactly as long as
the engine allows. It never polls.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

import torch

_logger = logging.getLogger(__name__)

Command = TypeVar("Command")
Output = TypeVar("Output")
CommandIn = TypeVar("CommandIn", contravariant=True)
OutputOut = TypeVar("OutputOut", covariant=True)


@dataclass(frozen=True, slots=True)
class StepResult(Generic[OutputOut]):
    """What a step has produced, and when the next one is due."""

    outputs: Sequence[OutputOut] = ()
    wait_s: float | None = None
    """How long the thread may wait for commands before it steps again: 0 or less not at all, None until one comes."""


class Engine(Protocol[CommandIn, OutputOut]):
    """What runs on the thread."""

    def apply(self, commands: Sequence[CommandIn]) -> None:
        """Take in commands, in the order of submission. Never called with none."""
        ...

    def step(self, arrived: Callable[[], Sequence[CommandIn]]) -> StepResult[OutputOut]:
        """Do one step of work, if there is any.

        ``arrived`` takes the commands that have come since the last `apply`, for an engine that wants to know of them
        before the step is over; it then applies them itself.
        """
        ...


class Waker(Protocol):
    """Has something for the engine now and then, which it fetches in its next step."""

    on_done: Callable[[], None]
    """Called from any thread when there is something."""


class ModelThreadStopped(RuntimeError):
    """The thread has been stopped or has failed, so the command would never be looked at."""


class _Stop:
    pass


class _Wake:
    pass


class ModelThread(Generic[Command, Output]):
    """Runs an engine on a thread of its own.

    `deliver` gets each step's outputs, if there are any, and `on_failure` the exception that ended the thread; both
    are called on the thread and should hand over at once (`loop.call_soon_threadsafe`).
    """

    def __init__(
        self,
        engine: Engine[Command, Output],
        deliver: Callable[[Sequence[Output]], None],
        *,
        on_failure: Callable[[BaseException], None] | None = None,
        num_threads: int | None = None,
        woken_by: Waker | None = None,
        name: str = "model",
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._on_failure = on_failure
        self._num_threads = num_threads
        self._queue: SimpleQueue[Command | _Stop | _Wake] = SimpleQueue()
        self._has_ended = threading.Event()
        if woken_by is not None:
            woken_by.on_done = self.wake
        # A daemon, so that a process whose main thread dies is not kept alive by a step that hangs on a device.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Queue a command and wake the thread. Callable from any thread; never blocks.

        Raises:
            ModelThreadStopped: the thread has ended. One that ends just now may still leave the command unread.
        """
        if self._has_ended.is_set():
            raise ModelThreadStopped(f"the {self._thread.name} thread has ended")
        self._queue.put(command)

    def wake(self) -> None:
        """Have the engine step, as if its waiting time were over. Callable from any thread; never blocks."""
        self._queue.put(_Wake())

    def stop(self) -> None:
        """End the thread after its present step and wait for it. Commands not yet applied are dropped. Repeatable."""
        self._queue.put(_Stop())
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop()
        # Whatever an engine raises must reach the owner: a thread that dies in silence is a server that hangs.
        except BaseException as error:
            self._has_ended.set()
            try:
                if self._on_failure is not None:
                    self._on_failure(error)
            finally:  # the owner first: out of memory, writing a log line may fail too
                _logger.exception("the %s thread has failed", self._thread.name)
        finally:
            self._has_ended.set()

    def _loop(self) -> None:
        if self._num_threads is not None:
            # OpenMP keeps this per thread: it counts only where the operations run.
            torch.set_num_threads(self._num_threads)
        wait_s: float | None = None
        while (commands := self._receive(wait_s)) is not None:
            if commands:
                self._engine.apply(commands)
            result = self._engine.step(self._arrived)
            if result.outputs:
                self._deliver(result.outputs)
            wait_s = result.wait_s

    def _receive(self, wait_s: float | None) -> list[Command] | None:
        """All queued commands, after waiting up to `wait_s` for a first one; None to stop."""
        commands: list[Command] = []
        try:
            item = self._queue.get(timeout=None if wait_s is None else max(0.0, wait_s))
            while not isinstance(item, _Stop):
                if not isinstance(item, _Wake):
                    commands.append(item)
                item = self._queue.get_nowait()
        except Empty:
            return commands
        return None

    def _arrived(self) -> list[Command]:
        """All commands that are in the queue now; to stop or to wake comes after the step."""
        commands: list[Command] = []
        others: list[_Stop | _Wake] = []
        with suppress(Empty):
            while True:
                item = self._queue.get_nowait()
                if isinstance(item, _Stop | _Wake):
                    others.append(item)
                else:
                    commands.append(item)
        for other in others:
            self._queue.put(other)
        return commands
