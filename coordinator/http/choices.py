"""The events of all choices of one HTTP request, in the order in which they happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from coordinator.coordinator import Coordinator
from coordinator.events import GenerateEvent, StartedEvent
from coordinator.requests import GenerateRequest

MAX_UNREAD = 16
"""Events that wait here for a slow reader; then they wait in their sessions, which end when they have too many."""


@dataclass(frozen=True, slots=True)
class ChoiceEvent:
    """An event of the choice with that index: those of the first prompt come first, ``n`` for each."""

    index: int
    event: GenerateEvent


async def choice_events(
    coordinator: Coordinator, requests: Sequence[GenerateRequest]
) -> AsyncGenerator[ChoiceEvent, None]:
    """Runs the requests at once; closing the generator ends them all. Raises the first error of any of them."""
    streams = [_events_of(coordinator, index, request) for index, request in enumerate(requests)]
    async with aclosing(streams[0] if len(streams) == 1 else _merged(streams)) as events:
        async for event in events:
            yield event


async def _events_of(
    coordinator: Coordinator, index: int, request: GenerateRequest
) -> AsyncGenerator[ChoiceEvent, None]:
    async with aclosing(coordinator.generate(request)) as events:
        num_choices = request.n or 1
        async for event in events:
            if isinstance(event, StartedEvent):
                for choice in range(num_choices):
                    yield ChoiceEvent(index * num_choices + choice, event)
            else:
                yield ChoiceEvent(index * num_choices + event.choice, event)


async def _merged(streams: Sequence[AsyncGenerator[ChoiceEvent, None]]) -> AsyncGenerator[ChoiceEvent, None]:
    queue: asyncio.Queue[ChoiceEvent | Exception | None] = asyncio.Queue(MAX_UNREAD)
    tasks = [asyncio.create_task(_forward(stream, queue)) for stream in streams]
    num_left = len(tasks)
    try:
        while num_left:
            match await queue.get():
                case ChoiceEvent() as event:
                    yield event
                case None:
                    num_left -= 1
                case error:
                    raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    stream: AsyncGenerator[ChoiceEvent, None], queue: asyncio.Queue[ChoiceEvent | Exception | None]
) -> None:
    """Ends with None, or with what the stream raised."""
    try:
        async with aclosing(stream) as events:
            async for event in events:
                await queue.put(event)
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
