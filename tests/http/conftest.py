"""The HTTP front door on a port of its own, over scripted workers in this process: no gRPC, no torch."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import httpx
import pytest
from openai import AsyncOpenAI

from coordinator.coordinator import Coordinator
from coordinator.http.app import make_app
from coordinator.http.server import HttpServer
from coordinator.in_process import InProcessClient
from coordinator.settings import CoordinatorSettings
from tests.doubles.scripted_workers import ScriptedDrafter, ScriptedTarget

PROMPT = "abc"


@dataclass
class FrontDoor:
    """A running server and all that is behind it."""

    url: str
    coordinator: Coordinator
    server: HttpServer
    target: ScriptedTarget
    drafter: ScriptedDrafter

    @property
    def num_worker_sessions(self) -> int:
        return self.target.num_sessions + self.drafter.num_sessions

    def openai(self, **options: object) -> AsyncOpenAI:
        given = {"api_key": "none", "max_retries": 0, "base_url": f"{self.url}/v1", **options}
        return AsyncOpenAI(**given)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running_front_door(
    target: ScriptedTarget | None = None, drafter: ScriptedDrafter | None = None, **settings: object
) -> AsyncIterator[FrontDoor]:
    """Policy ``fixed`` with K 4 unless told otherwise, so that every test speculates the same."""
    target, drafter = target or ScriptedTarget(), drafter or ScriptedDrafter()
    chosen = CoordinatorSettings(
        targets=["in-process:0"],
        **{"policy": "fixed", "max_k": 4, "http_port": 0, **settings},  # type: ignore[arg-type]
    )
    coordinator = Coordinator(chosen, [InProcessClient(target)], [InProcessClient(drafter)])
    server = HttpServer(make_app(coordinator, chosen), "127.0.0.1", 0, chosen.grace_s, coordinator.end_requests)
    try:
        await coordinator.start()
        address = await server.open()
        yield FrontDoor(f"http://{address}", coordinator, server, target, drafter)
    finally:
        await server.stop()
        await coordinator.close()


@pytest.fixture
async def front_door() -> AsyncIterator[FrontDoor]:
    async with running_front_door() as running:
        yield running


@pytest.fixture
async def client(front_door: FrontDoor) -> AsyncIterator[AsyncOpenAI]:
    async with front_door.openai() as client:
        yield client


@pytest.fixture
async def web(front_door: FrontDoor) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=front_door.url) as web:
        yield web


def text_of(deltas: Sequence[str | None]) -> str:
    return "".join(delta or "" for delta in deltas)
