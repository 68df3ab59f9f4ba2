"""The same coordinator over workers in its own process: no socket, same tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from coordinator.coordinator import Coordinator
from coordinator.events import FinishedEvent, TokensEvent
from coordinator.in_process import InProcessClient
from coordinator.requests import GenerateRequest
from coordinator.settings import CoordinatorSettings
from rpc.errors import Cancelled, Unavailable
from speculation.messages import CloseSession, Commit, Heard
from tests.doubles.eventually import eventually
from tests.doubles.scripted_workers import TOY_LETTERS, ScriptedDrafter, ScriptedTarget, toy_tokenizer_json
from tests.rpc.conftest import PROMPT, spoken

REQUEST = GenerateRequest(prompt=PROMPT, max_tokens=50, ignore_eos=True)


@pytest.fixture
def target() -> ScriptedTarget:
    return ScriptedTarget()


@pytest.fixture
def draft() -> ScriptedDrafter:
    return ScriptedDrafter()


@pytest.fixture
async def coordinator(target: ScriptedTarget, draft: ScriptedDrafter) -> AsyncIterator[Coordinator]:
    settings = CoordinatorSettings(targets="in-process:0", policy="fixed", max_k=4)
    coordinator = Coordinator(settings, [InProcessClient(target)], [InProcessClient(draft)])
    await coordinator.start()
    yield coordinator
    await coordinator.close()


async def test_tokens_are_the_targets(coordinator: Coordinator, target: ScriptedTarget, draft: ScriptedDrafter) -> None:
    events = [event async for event in coordinator.generate(REQUEST)]

    tokens = [piece.token_id for event in events if isinstance(event, TokensEvent) for piece in event.tokens]
    assert tokens == spoken(PROMPT, 50)
    assert isinstance(events[-1], FinishedEvent)
    assert events[-1].stats.num_accepted > 0
    await eventually(lambda: target.num_sessions == draft.num_sessions == 0, "the session closed on both workers")


async def test_an_unfinished_character_at_the_end_is_told(draft: ScriptedDrafter) -> None:
    [last] = spoken(PROMPT, 1)
    letters = list(TOY_LETTERS)
    letters[last - 1] = "\u00e6"  # byte 0xE6: the first of three
    tokenizer_json = toy_tokenizer_json("".join(letters))
    client = InProcessClient(ScriptedTarget(tokenizer_json=tokenizer_json))
    coordinator = Coordinator(CoordinatorSettings(targets="in-process:0"), [client], [])
    await coordinator.start()
    try:
        request = GenerateRequest(prompt=PROMPT, max_tokens=1, ignore_eos=True)
        events = [event async for event in coordinator.generate(request)]
    finally:
        await coordinator.close()

    texts = [event.text for event in events if isinstance(event, TokensEvent)]
    assert texts == ["", "\ufffd"]


async def test_closing_the_iterator_closes_the_session_on_both_workers(
    coordinator: Coordinator, target: ScriptedTarget, draft: ScriptedDrafter
) -> None:
    target.hold(num_turns=2)
    async with aclosing(coordinator.generate(REQUEST)) as events:
        async for event in events:
            if isinstance(event, TokensEvent):
                break
    await eventually(lambda: target.num_sessions == draft.num_sessions == 0, "the session closed")
    assert CloseSession() in target.commands
    assert CloseSession() in draft.commands


async def test_what_is_sent_in_one_turn_of_the_loop_is_one_frame(coordinator: Coordinator) -> None:
    frames: list[int] = []

    class Connection:
        def submit(self, items: list[object], heard: Heard) -> None:
            frames.append(len(items))

        def close(self) -> None: ...

    class Core(ScriptedTarget):
        def connect(self, deliver: object) -> Connection:  # type: ignore[override]
            return Connection()

    connection = await InProcessClient(Core()).connect(lambda frame: None, lambda error: None)
    for session_id in range(5):
        connection.send(session_id, Commit(0, ()))  # type: ignore[arg-type]
    await eventually(lambda: bool(frames), "a frame")
    assert frames == [5]


async def test_closing_the_coordinator_ends_requests_with_cancelled(
    coordinator: Coordinator, target: ScriptedTarget
) -> None:
    target.hold()
    events = coordinator.generate(REQUEST)
    await anext(events)

    await coordinator.close()

    with pytest.raises(Cancelled):
        await anext(events)
    with pytest.raises(Unavailable):
        await anext(coordinator.generate(REQUEST))
    assert target.connections == []
