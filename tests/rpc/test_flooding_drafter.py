"""A draft worker that sends far more than it may: others, and its own sessions, read what plain decoding says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest

from coordinator import grpc_clients
from coordinator.grpc_clients import MAX_DRAFT_EVENTS, MAX_DRAFT_FRAME_BYTES, grpc_draft_client
from protos import draft_pb2, target_pb2
from rpc import draft_codec, target_codec
from rpc.draft_codec import DraftFrame
from rpc.errors import Unavailable
from rpc.server import RpcServer
from speculation.draft_distribution import MAX_DRAFT_TOP_N, DraftDistribution
from speculation.messages import (
    MAX_PROPOSAL_TOKENS,
    Heard,
    Proposal,
    SessionId,
    SetK,
    TargetCommand,
)
from tests.doubles.eventually import eventually
from tests.doubles.scripted_workers import ScriptedDrafter, ScriptedTarget
from tests.rpc.conftest import PROMPT, collect, generate_request, running_stack, spoken

TOO_MANY_BYTES = MAX_DRAFT_FRAME_BYTES // 4


def each(change: Callable[[Proposal], Proposal]) -> Callable[[DraftFrame], DraftFrame]:
    return lambda frame: tuple((id_, change(event) if isinstance(event, Proposal) else event) for id_, event in frame)


FLOODS: dict[str, Callable[[DraftFrame], DraftFrame]] = {
    "tokens": each(lambda one: replace(one, token_ids=one.token_ids * 20_000)),
    "confidences": each(lambda one: replace(one, confidences=(1.0,) * 500_000)),
    "distributions": each(lambda one: replace(one, distributions=(DraftDistribution((1,) * 2000, (1,) * 2000),) * 100)),
    "proposals": lambda frame: tuple(frame) * 500,
    "events": lambda frame: tuple(frame) * (MAX_DRAFT_EVENTS + 1),
    "bytes": each(lambda one: replace(one, confidences=(1.0,) * TOO_MANY_BYTES)),
}


class FloodingDrafter(ScriptedDrafter):
    """Floods with every third frame."""

    def __init__(self, flood: Callable[[DraftFrame], DraftFrame]) -> None:
        super().__init__()
        self._flood = flood
        self._num_frames = 0

    def step(self, connection: Any) -> DraftFrame | None:
        frame = super().step(connection)
        if frame is None:
            return None
        self._num_frames += 1
        return frame if self._num_frames % 3 else self._flood(frame)


class CarefulTarget(ScriptedTarget):
    """Notes what it is told of drafts."""

    def __init__(self) -> None:
        super().__init__(turn_s=0.005)
        self.proposals: list[Proposal] = []

    def apply(self, connection: Any, items: Sequence[tuple[SessionId, TargetCommand]]) -> None:
        self.proposals.extend(command for _, command in items if isinstance(command, Proposal))
        super().apply(connection, items)


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_reaches_nobody(name: str) -> None:
    target = CarefulTarget()
    async with running_stack([target], [FloodingDrafter(FLOODS[name])]) as stack:
        plain = generate_request(max_tokens=40)
        plain.speculation.disabled = True
        requests = [plain, *(generate_request(max_tokens=40) for _ in range(3))]
        answers = await asyncio.gather(*(collect(stack.stub.Generate(request)) for request in requests))
    assert [answer.token_ids for answer in answers] == [spoken(PROMPT, 40)] * 4
    assert all(answer.finished is not None for answer in answers)
    assert target.proposals, "honest frames get through"
    assert max(len(proposal.token_ids) for proposal in target.proposals) <= MAX_PROPOSAL_TOKENS
    assert not any(proposal.distributions for proposal in target.proposals)


def flooded(name: str) -> bytes:
    return draft_codec.draft_frame_to_proto(
        FLOODS[name](((SessionId(1), Proposal(1, 2, (3,), ())),))
    ).SerializeToString()


@pytest.mark.parametrize("data", [flooded("events"), flooded("bytes"), b"rubbish"], ids=["events", "bytes", "rubbish"])
async def test_a_frame_that_is_not_to_be_read_is_a_lost_worker(data: bytes) -> None:
    async def draft(requests: object, context: object) -> AsyncIterator[bytes]:
        yield draft_pb2.DraftEvents().SerializeToString()
        yield data

    server = RpcServer("127.0.0.1", 0, [])
    handlers = {"Draft": grpc.stream_stream_rpc_method_handler(draft)}
    server.grpc_server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("outrider.v1.DraftWorker", handlers)]
    )
    client = grpc_draft_client(await server.open(), 5.0, {})
    frames: list[DraftFrame] = []
    losses: list[Exception | None] = []
    try:
        connection = await client.connect(frames.append, losses.append)
        await eventually(lambda: bool(losses), "the loss")
        await connection.close()
    finally:
        await client.close()
        await server.stop(0)
    assert frames == [()]
    assert [type(one) for one in losses] == [Unavailable]
    assert "cannot be read" in str(losses[0])


def test_no_more_is_read_of_a_proposal_than_a_valid_one_has() -> None:
    q = DraftDistribution((1,) * 5000, (1,) * 5000)
    sent = Proposal(1, 2, (3,) * 5000, (0.5,) * 5000, distributions=(q,) * 300)
    ((_, read),) = draft_codec.draft_frame_from_proto(draft_codec.draft_frame_to_proto(((SessionId(1), sent),)))
    assert isinstance(read, Proposal)
    assert len(read.token_ids) == MAX_PROPOSAL_TOKENS + 1, "still malformed"
    assert len(read.confidences) == len(read.distributions) == MAX_PROPOSAL_TOKENS
    assert {(len(one.token_ids), len(one.weights)) for one in read.distributions} == {(MAX_DRAFT_TOP_N + 1,) * 2}


def test_what_is_too_much_for_one_frame_to_a_worker_wanted_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_clients, "MAX_SENT_BYTES", 300)
    items: list[tuple[SessionId, TargetCommand]] = [(SessionId(index), SetK(index % 7)) for index in range(100)]
    items.insert(50, (SessionId(7), Proposal(1, 2, (1,) * 256, ())))  # one that is too large by itself leaves alone
    heard = Heard(3, 0.5)
    frames = list(grpc_clients._TARGET_WIRE.encode_all(items, heard))
    assert len(frames) > 3
    assert sum(len(data) > 300 for data in frames) <= 1
    decoded = [target_pb2.TargetCommands.FromString(data) for data in frames]
    assert [item for frame in decoded for item in target_codec.target_commands_from_proto(frame)] == items
    assert {target_codec.heard_from_proto(frame) for frame in decoded} == {heard}
