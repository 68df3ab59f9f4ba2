"""Whatever a request says, it is answered or refused by name; who shares its stream and its batch notices nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.servicer import GENERATION_SERVICE, GenerationServicer
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc
from rpc.channel import open_channel
from rpc.server import RpcServer
from tests.doubles import reference
from tests.workers.test_exactness import stack

WITNESS_PROMPT = (5, 6, 7, 8)
WITNESS = reference.Parameters(1.0, seed=9, frequency_penalty=0.5)
WITNESS_TOKENS = 24
REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}

_small = st.integers(0, 12)
_VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_DOUBLE: st.sampled_from([0.0, 0.5, 1.0, 1.7, -1.0]) | st.floats(),
    FieldDescriptor.TYPE_FLOAT: st.sampled_from([0.0, -100.0, 5.5]) | st.floats(width=32),
    FieldDescriptor.TYPE_INT64: _small | st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: _small | st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_ENUM: st.integers(0, 3),
    FieldDescriptor.TYPE_STRING: st.sampled_from(["", "a", "ab", "fixed", "processed", "raw"]) | st.text(max_size=6),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=6),
}


@st.composite
def filled(draw: st.DrawFn, kind: type[Message], max_fields: int) -> Any:
    """A message with a few of its fields set, to anything."""
    message = kind()
    every = list(kind.DESCRIPTOR.fields)
    for field in draw(st.lists(st.sampled_from(every), max_size=max_fields, unique_by=lambda field: field.number)):
        is_list = hasattr(getattr(message, field.name), "append")
        for _ in range(draw(st.integers(0, 4)) if is_list else 1):
            _set(message, field, draw)
    return message


def _set(message: Message, field: FieldDescriptor, draw: st.DrawFn) -> None:
    value = getattr(message, field.name)
    is_list = hasattr(value, "append")
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        part = draw(filled(type(value.add()) if is_list else type(value), 3))
        if is_list:
            value[-1].CopyFrom(part)
        else:
            value.CopyFrom(part)
    elif is_list:
        value.append(draw(_VALUES[field.type]))
    else:
        setattr(message, field.name, draw(_VALUES[field.type]))


def as_request(message: pb.GenerateRequest) -> pb.GenerateRequest:
    """Short, and with a prompt if it has none."""
    if message.WhichOneof("prompt") is None:
        message.tokens.ids.extend((3, 4, 5))
    if not message.HasField("max_tokens"):
        message.max_tokens = 6
    return message


def witness() -> pb.GenerateRequest:
    return pb.GenerateRequest(
        tokens=pb.TokenIds(ids=WITNESS_PROMPT),
        max_tokens=WITNESS_TOKENS,
        temperature=WITNESS.temperature,
        seed=WITNESS.seed,
        frequency_penalty=WITNESS.frequency_penalty,
    )


async def answers(stub: Any, requests: dict[str, pb.GenerateRequest]) -> dict[str, list[pb.GenerateManyEvent]]:
    async def messages() -> AsyncIterator[pb.GenerateManyRequest]:
        for tag, request in requests.items():
            yield pb.GenerateManyRequest(tag=tag, generate=request)

    found: dict[str, list[pb.GenerateManyEvent]] = {tag: [] for tag in requests}
    async for event in stub.GenerateMany(messages()):
        found[event.tag].append(event)
    return found


@given(st.lists(filled(pb.GenerateRequest, 4).map(as_request), min_size=4, max_size=10))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_fuzzed_request_ends_nobody_elses(make_runtime, model_folders, target_model, fuzzed) -> None:
    expected = reference.decode(target_model, WITNESS_PROMPT, WITNESS, WITNESS_TOKENS, stop_token_ids=(0,))
    asyncio.run(_run(make_runtime, model_folders, fuzzed, expected))


async def _run(make_runtime, model_folders, fuzzed: list[pb.GenerateRequest], expected: list[int]) -> None:
    requests = {f"fuzzed {index}": request for index, request in enumerate(fuzzed)}
    requests = {"before": witness(), **requests, "after": witness()}
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        server = RpcServer("127.0.0.1", 0, [GENERATION_SERVICE])
        generation_pb2_grpc.add_GenerationServicer_to_server(GenerationServicer(coordinator, 100), server.grpc_server)
        address = await server.open()
        try:
            async with open_channel(address) as channel:
                found = await answers(generation_pb2_grpc.GenerationStub(channel), requests)
        finally:
            await server.stop(0)
        assert coordinator.num_sessions == 0
    for tag in ("before", "after"):
        said = [token.id for event in found[tag] for token in event.tokens.tokens]
        assert said == expected
    for tag, request in requests.items():
        _check_answered(request, found[tag])


def _check_answered(request: pb.GenerateRequest, events: list[pb.GenerateManyEvent]) -> None:
    if events[-1].WhichOneof("event") == "failed":
        failed = events[-1].failed
        assert failed.code in REFUSALS, failed
        assert failed.field or failed.code != "INVALID_ARGUMENT"
    else:
        finished = [event.choice for event in events if event.WhichOneof("event") == "finished"]
        assert sorted(finished) == list(range(request.n or 1))
