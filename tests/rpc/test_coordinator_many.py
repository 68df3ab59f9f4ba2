"""Many requests over one stream: tags, cancels, failures, and what happens when the client goes."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from protos import generation_pb2
from tests.doubles.eventually import eventually
from tests.doubles.scripted_workers import ScriptedDrafter, ScriptedTarget
from tests.rpc.conftest import Answer, Stack, generate_request, running_stack, spoken

MAX_REQUESTS = 10


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with running_stack([ScriptedTarget()], [ScriptedDrafter()], max_requests_per_stream=MAX_REQUESTS) as stack:
        yield stack


class Conversation:
    """One GenerateMany stream; answers are collected by a task of their own."""

    def __init__(self, stack: Stack) -> None:
        self.call = stack.stub.GenerateMany()
        self.answers: defaultdict[str, Answer] = defaultdict(Answer)
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for event in self.call:
            self.answers[event.tag].add(event)

    async def ask(self, tag: str, **fields: object) -> None:
        request = generate_request(**fields)  # type: ignore[arg-type]
        await self.call.write(generation_pb2.GenerateManyRequest(tag=tag, generate=request))

    async def cancel(self, tag: str) -> None:
        await self.call.write(generation_pb2.GenerateManyRequest(tag=tag, cancel=generation_pb2.Cancel()))

    async def end(self) -> dict[str, Answer]:
        await self.call.done_writing()
        await self.reader
        return self.answers

    async def failure(self, tag: str) -> generation_pb2.Failed:
        await eventually(lambda: self.answers[tag].failed is not None, f"{tag} failed")
        failed = self.answers[tag].failed
        assert failed is not None
        return failed


@asynccontextmanager
async def conversation(stack: Stack) -> AsyncIterator[Conversation]:
    conversation = Conversation(stack)
    try:
        yield conversation
    finally:
        conversation.call.cancel()
        await asyncio.gather(conversation.reader, return_exceptions=True)


async def test_eight_requests_of_which_one_is_cancelled(stack: Stack) -> None:
    stack.targets[0].core.hold(num_turns=5)
    prompts = {f"tag {index}": (1 + index, 2, 3) for index in range(8)}
    async with conversation(stack) as talk:
        for tag, prompt in prompts.items():
            await talk.ask(tag, prompt=prompt, max_tokens=50)
        await eventually(lambda: stack.targets[0].core.num_sessions == 8, "eight sessions")

        await talk.cancel("tag 3")
        failed = await talk.failure("tag 3")
        await eventually(lambda: stack.targets[0].core.num_sessions == 7, "seven sessions left")
        stack.targets[0].core.release()
        answers = await talk.end()

    assert failed.code == "CANCELLED"
    for tag, prompt in prompts.items():
        if tag != "tag 3":
            assert answers[tag].token_ids == spoken(prompt, 50)
            assert answers[tag].finished is not None
    assert answers["tag 3"].finished is None
    await eventually(lambda: stack.num_worker_sessions == 0, "all sessions closed")


async def test_duplicate_tag_fails_and_the_first_goes_on(stack: Stack) -> None:
    # Events of the two cannot be told apart by tag, so the second one's failure is looked for before the release.
    stack.targets[0].core.hold()
    async with conversation(stack) as talk:
        await talk.ask("same", max_tokens=20)
        await talk.ask("same", max_tokens=30)
        failed = await talk.failure("same")
        stack.targets[0].core.release()
        answers = await talk.end()

    assert (failed.code, failed.field) == ("INVALID_ARGUMENT", "tag")
    assert answers["same"].token_ids == spoken((1, 2, 3), 20)


async def test_tag_is_free_again_when_its_request_is_over(stack: Stack) -> None:
    async with conversation(stack) as talk:
        await talk.ask("tag", max_tokens=5)
        await eventually(lambda: talk.answers["tag"].is_over, "the first answer")
        first = talk.answers.pop("tag")
        await talk.ask("tag", max_tokens=7)
        answers = await talk.end()

    assert first.token_ids == spoken((1, 2, 3), 5)
    assert answers["tag"].token_ids == spoken((1, 2, 3), 7)


async def test_bad_request_fails_alone(stack: Stack) -> None:
    async with conversation(stack) as talk:
        await talk.ask("good", max_tokens=30)
        await talk.ask("bad", temperature=-1.0)
        await talk.call.write(generation_pb2.GenerateManyRequest(tag="nothing"))
        await talk.cancel("unknown")
        answers = await talk.end()

    assert answers["good"].token_ids == spoken((1, 2, 3), 30)
    failures = {tag: answer.failed for tag, answer in answers.items() if answer.failed is not None}
    assert {tag: (failed.code, failed.field) for tag, failed in failures.items()} == {
        "bad": ("INVALID_ARGUMENT", "temperature"),
        "nothing": ("INVALID_ARGUMENT", "command"),
    }


async def test_too_many_on_one_stream_is_resource_exhausted(stack: Stack) -> None:
    stack.targets[0].core.hold()
    async with conversation(stack) as talk:
        for index in range(MAX_REQUESTS + 1):
            await talk.ask(str(index), max_tokens=10)
        failed = await talk.failure(str(MAX_REQUESTS))
        stack.targets[0].core.release()
        answers = await talk.end()

    assert failed.code == "RESOURCE_EXHAUSTED"
    assert sum(answer.finished is not None for answer in answers.values()) == MAX_REQUESTS


async def test_half_close_at_once_lets_requests_finish(stack: Stack) -> None:
    async with conversation(stack) as talk:
        await talk.ask("only", max_tokens=60)
        answers = await talk.end()

    assert answers["only"].token_ids == spoken((1, 2, 3), 60)


async def test_client_gone_cancels_everything(stack: Stack) -> None:
    stack.targets[0].core.hold(num_turns=5)
    async with conversation(stack) as talk:
        for index in range(4):
            await talk.ask(str(index), max_tokens=2000)
        await eventually(lambda: stack.targets[0].core.num_sessions == 4, "four sessions")

    await eventually(lambda: stack.num_worker_sessions == 0, "all sessions closed")


async def test_lost_target_fails_tags_and_keeps_the_stream() -> None:
    async with running_stack([ScriptedTarget()], target_wait_s=0.1) as stack:
        stack.targets[0].core.hold(num_turns=2)
        async with conversation(stack) as talk:
            await talk.ask("doomed", max_tokens=100)
            await eventually(lambda: len(talk.answers["doomed"].token_ids) == 2, "two tokens")
            await stack.targets[0].kill()
            failed = await talk.failure("doomed")
            assert not talk.reader.done()
            await stack.targets[0].start()
            stack.targets[0].core.release()
            await eventually(lambda: stack.coordinator.deployment().num_targets == 1, "the target is back")
            await talk.ask("later", max_tokens=10)
            answers = await talk.end()

    assert failed.code == grpc.StatusCode.UNAVAILABLE.name
    assert answers["later"].token_ids == spoken((1, 2, 3), 10)
