"""A delayed link: everything arrives, in order, later, and nothing after the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from coordinator.clients import OnLost, WorkerConnection
from coordinator.delay import DelayedClient
from speculation.messages import ModelInfo, SessionId
from tests.doubles.eventually import eventually

DELAY_S = 0.03


class FakeConnection:
    def __init__(self) -> None:
        self.sent: list[tuple[SessionId, str]] = []
        self.sent_s: list[float] = []
        self.closed = False

    def send(self, session_id: SessionId, command: str) -> None:
        self.sent.append((session_id, command))
        self.sent_s.append(time.monotonic())

    async def close(self) -> None:
        self.closed = True


class FakeClient:
    name = "fake"

    def __init__(self) -> None:
        self.connection = FakeConnection()

    async def describe(self) -> tuple[ModelInfo, bytes]:
        raise NotImplementedError

    async def connect(self, on_frame: Callable[[str], None], on_lost: OnLost) -> WorkerConnection[str]:
        self.on_frame, self.on_lost = on_frame, on_lost
        return self.connection

    async def close(self) -> None:
        """Holds nothing."""


class Received:
    """What the coordinator's end of the link was told."""

    def __init__(self) -> None:
        self.news: list[object] = []
        self.times_s: list[float] = []
        self.changed = asyncio.Event()

    def note(self, what: object) -> None:
        self.news.append(what)
        self.times_s.append(time.monotonic())
        self.changed.set()

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.news) < count:
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


async def test_frames_and_the_loss_arrive_later_and_in_order(client: FakeClient) -> None:
    received = Received()
    await DelayedClient(client, DELAY_S).connect(received.note, received.note)
    start_s = time.monotonic()
    for index in range(50):
        client.on_frame(str(index))
    client.on_lost(None)
    assert received.news == []
    await received.wait_for(51)
    assert received.news == [*map(str, range(50)), None]
    assert received.times_s[0] - start_s >= 0.99 * DELAY_S


async def test_commands_leave_later_and_in_order_and_none_after_closing(client: FakeClient) -> None:
    received = Received()
    connection = await DelayedClient(client, DELAY_S).connect(received.note, received.note)
    start_s = time.monotonic()
    for index in range(3):
        connection.send(SessionId(index), "first turn")
    assert client.connection.sent == []
    await asyncio.sleep(0)
    connection.send(SessionId(3), "second turn")
    await eventually(lambda: len(client.connection.sent) == 4, "all commands")
    assert [session for session, _ in client.connection.sent] == [0, 1, 2, 3]
    assert client.connection.sent_s[0] - start_s >= 0.99 * DELAY_S

    connection.send(SessionId(4), "too late")
    client.on_frame("too late")
    await connection.close()
    assert client.connection.closed
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(2 * DELAY_S, done.set)
    await done.wait()
    assert len(client.connection.sent) == 4
    assert received.news == []
