"""Events into an answer: one JSON object, or a stream of chunks that ends with ``[DONE]``."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from pydantic_core import to_json
from sse_starlette.sse import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.coordinator import Coordinator
from coordinator.events import FinishedEvent, StartedEvent, TokensEvent
from coordinator.http import figures
from coordinator.http.choices import ChoiceEvent, choice_events
from coordinator.http.disconnect import while_connected
from coordinator.http.errors import defect, error_body
from coordinator.http.shapes import Answer, Json, Shape
from coordinator.requests import GenerateRequest
from rpc.errors import OutriderError

Events = AsyncGenerator[ChoiceEvent, None]

SEND_TIMEOUT_S = 120.0
"""A client that reads nothing for so long is gone, whatever its connection says."""

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """What an answer says besides its text."""

    shape: Shape
    request_id: str
    model: str
    streams: bool = False
    include_usage: bool = False
    traces: bool = False
    num_choices: int = 1
    """For each prompt."""
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, choices: Sequence[Json], is_chunk: bool) -> Json:
        return {
            "id": self.shape.id_prefix + self.request_id,
            "object": self.shape.chunk_object if is_chunk else self.shape.whole_object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def figured(self, finished: Sequence[FinishedEvent]) -> Json:
        """The counts of all choices together."""
        return {"usage": figures.usage(finished, self.num_choices), "metrics": figures.metrics(finished)}


async def respond(
    request: Request, coordinator: Coordinator, requests: Sequence[GenerateRequest], reply: Reply
) -> Response:
    """Runs the requests and answers. The work ends with the client's connection.

    Raises what `Coordinator.generate` raises, until the first token is on its way; in a stream later errors are its
    last event.
    """
    events = choice_events(coordinator, requests)
    try:
        first = await while_connected(request, anext(events))
        if reply.streams:
            return _EventStream(_chunks(events, first, reply), events)
        answer = await while_connected(request, _whole(events, first, reply))
    except BaseException:
        await events.aclose()
        raise
    return Response(to_json(answer), media_type="application/json")


class _EventStream(EventSourceResponse):
    """Ends the work however the response ends, also if it never began to be sent."""

    def __init__(self, body: AsyncIterator[bytes], events: Events) -> None:
        super().__init__(body, send_timeout=SEND_TIMEOUT_S)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _whole(events: Events, first: ChoiceEvent, reply: Reply) -> Json:
    answers = {first.index: Answer(first.index)}
    async for choice in events:
        answer = answers.setdefault(choice.index, Answer(choice.index))
        match choice.event:
            case TokensEvent() as tokens:
                answer.parts.append(tokens.text)
                answer.pieces.extend(tokens.tokens)
            case FinishedEvent() as end:
                answer.end = end
    ended = [(answer, answer.end) for _, answer in sorted(answers.items()) if answer.end is not None]
    choices = [reply.shape.whole(answer, end) for answer, end in ended]
    return {**reply.envelope(choices, is_chunk=False), **reply.figured([end for _, end in ended])}


async def _chunks(events: Events, first: ChoiceEvent, reply: Reply) -> AsyncIterator[bytes]:
    """Server-sent events, ready to be sent. An error is the last of them, for the status is sent by now."""
    try:
        async for chunk in _chunk_bodies(events, first, reply):
            yield _event(chunk)
        yield _DONE
    except OutriderError as error:
        yield _event(error_body(error))
    except Exception as error:
        yield _event(error_body(defect(error)))


async def _chunk_bodies(events: Events, first: ChoiceEvent, reply: Reply) -> AsyncIterator[Json]:
    finished: list[FinishedEvent] = []
    num_chars: defaultdict[int, int] = defaultdict(int)
    for chunk in _opening(first.index, reply):
        yield chunk
    async for choice in events:
        index = choice.index
        match choice.event:
            case TokensEvent() as tokens:
                delta = reply.shape.delta(index, tokens.text, tokens.tokens, num_chars[index])
                num_chars[index] += len(tokens.text)
                yield _chunk(reply, delta, tokens)
            case StartedEvent():
                for chunk in _opening(index, reply):
                    yield chunk
            case FinishedEvent() as end:
                finished.append(end)
                chunk = _chunk(reply, reply.shape.ending(index, end))
                yield chunk if reply.include_usage else {**chunk, "metrics": figures.metrics([end])}
    if reply.include_usage:
        yield {**reply.envelope([], is_chunk=True), **reply.figured(finished)}


def _opening(index: int, reply: Reply) -> list[Json]:
    choice = reply.shape.opening(index)
    return [] if choice is None else [_chunk(reply, choice)]


def _chunk(reply: Reply, choice: Json, tokens: TokensEvent | None = None) -> Json:
    chunk = reply.envelope([choice], is_chunk=True)
    if reply.include_usage:
        chunk["usage"] = None
    if reply.traces and tokens is not None:
        chunk["speculation"] = figures.trace(tokens)
    return chunk


def _event(body: Json) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"
