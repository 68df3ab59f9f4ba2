"""Many requests over one stream: each runs in a task of its own, all answer through one bounded queue.

A client that reads too slowly first fills the queue, then its requests' own buffers, and then they fail; other streams
notice nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing

from coordinator.coordinator import Coordinator
from coordinator.wire import failed_to_proto, request_from_proto, tagged_event_to_proto
from protos import generation_pb2
from rpc.errors import Cancelled, FieldViolation, InvalidRequest, OutriderError, Overloaded

MAX_UNSENT_EVENTS = 64

_log = logging.getLogger(__name__)


class ManyRequests:
    """The requests of one GenerateMany stream."""

    def __init__(self, coordinator: Coordinator, max_requests: int) -> None:
        self._coordinator = coordinator
        self._max_requests = max_requests
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._taken_back: set[str] = set()
        self._unsent: asyncio.Queue[generation_pb2.GenerateManyEvent | None] = asyncio.Queue(MAX_UNSENT_EVENTS)

    async def run(
        self, messages: AsyncIterable[generation_pb2.GenerateManyRequest]
    ) -> AsyncGenerator[generation_pb2.GenerateManyEvent, None]:
        """Events of all requests, until the client has half-closed and the last one is answered.

        Closing or cancelling it cancels all requests.
        """
        runner = asyncio.create_task(self._run_all(messages))
        runner.add_done_callback(self._wake)
        try:
            while not (runner.done() and self._unsent.empty()):
                event = await self._unsent.get()
                if event is not None:
                    yield event
            await runner
        finally:
            runner.cancel()

    async def _run_all(self, messages: AsyncIterable[generation_pb2.GenerateManyRequest]) -> None:
        async with asyncio.TaskGroup() as group:
            async for message in messages:
                await self._take(message, group)

    def _wake(self, runner: asyncio.Task[None]) -> None:
        if not self._unsent.full():  # otherwise `run` is not waiting
            self._unsent.put_nowait(None)

    async def _take(self, message: generation_pb2.GenerateManyRequest, group: asyncio.TaskGroup) -> None:
        tag = message.tag
        if message.WhichOneof("command") == "cancel":
            if tag in self._tasks:
                self._taken_back.add(tag)
                self._tasks[tag].cancel()
        elif (refusal := self._refusal(message)) is not None:
            await self._unsent.put(failed_to_proto(tag, refusal))
        else:
            self._tasks[tag] = group.create_task(self._answer(tag, message.generate))

    def _refusal(self, message: generation_pb2.GenerateManyRequest) -> OutriderError | None:
        if message.WhichOneof("command") is None:
            return InvalidRequest(FieldViolation("command", "is not set; send generate or cancel"))
        if message.tag in self._tasks:
            problem = f"{message.tag!r} is in use by a request under way on this stream; choose another tag"
            return InvalidRequest(FieldViolation("tag", problem))
        if len(self._tasks) >= self._max_requests:
            return Overloaded(f"{self._max_requests} requests are under way on this stream; wait for one to end")
        return None

    async def _answer(self, tag: str, message: generation_pb2.GenerateRequest) -> None:
        try:
            async with aclosing(self._coordinator.generate(request_from_proto(message))) as events:
                async for event in events:
                    await self._unsent.put(tagged_event_to_proto(tag, event))
        except OutriderError as error:
            await self._fail(tag, error)
        except asyncio.CancelledError:
            if tag not in self._taken_back:  # the whole stream is going
                raise
            await self._fail(tag, Cancelled("cancelled by the client"))
        except Exception as error:  # a defect in one request must not end the others
            _log.exception("request failed")
            await self._fail(tag, OutriderError(f"the coordinator failed at this request: {error!r}"))
        finally:
            self._tasks.pop(tag, None)
            self._taken_back.discard(tag)

    async def _fail(self, tag: str, error: OutriderError) -> None:
        await self._unsent.put(failed_to_proto(tag, error))
