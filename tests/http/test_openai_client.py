"""The official ``openai`` package, unchanged, against a running server."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.doubles.eventually import eventually
from tests.doubles.scripted_workers import ScriptedTarget
from tests.http.conftest import PROMPT, FrontDoor, running_front_door, text_of

CHAT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "abc"}]


async def test_models(client: AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == ["toy-target"]
    assert (await client.models.retrieve("toy-target")).id == "toy-target"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-4")


async def test_chat_is_the_same_whole_and_streamed(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="toy-target", messages=CHAT, max_tokens=30)
    stream = await client.chat.completions.create(
        model="toy-target",
        messages=CHAT,
        max_completion_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content
    assert text_of([c.delta.content for chunk in chunks for c in chunk.choices]) == whole.choices[0].message.content
    assert [c.delta.role for chunk in chunks for c in chunk.choices if c.delta.role] == ["assistant"]
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_synchronous_client(front_door: FrontDoor) -> None:
    def talk() -> tuple[str, str, str]:
        with OpenAI(api_key="none", base_url=f"{front_door.url}/v1", max_retries=0) as client:
            whole = client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=20).choices[0].text
            with client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=20, stream=True) as stream:
                streamed = text_of([choice.text for chunk in stream for choice in chunk.choices])
            chat = client.chat.completions.create(model="toy-target", messages=CHAT, max_tokens=5)
        return whole, streamed, chat.choices[0].message.content or ""

    whole, streamed, chat = await asyncio.to_thread(talk)
    assert whole == streamed != ""
    assert chat


async def test_bad_values_are_bad_requests_that_name_the_field(client: AsyncOpenAI) -> None:
    for field, value in (("temperature", -1), ("top_p", 2), ("max_tokens", 0), ("seed", -1)):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.completions.create(model="toy-target", prompt=PROMPT, extra_body={field: value})
        assert (refused.value.param, refused.value.type) == (field, "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="toy-target", messages=CHAT, max_completion_tokens=99999)
    assert refused.value.param == "max_completion_tokens"


async def test_another_model_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        await client.completions.create(model="gpt-4", prompt=PROMPT)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert "toy-target" in str(refused.value)


async def test_a_full_queue_is_a_rate_limit_that_says_when_to_come_again() -> None:
    async with running_front_door(max_sessions=1, max_queue=0) as door, door.openai() as client:
        door.target.hold(num_turns=1)
        first = asyncio.create_task(client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=4))
        await eventually(lambda: door.num_worker_sessions > 0, "the first request is under way")
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(model="toy-target", prompt=PROMPT)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        door.target.release()
        assert (await first).choices


async def test_a_client_that_times_out_ends_its_work() -> None:
    async with running_front_door() as door, door.openai() as client:
        door.target.hold(num_turns=2)
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=40, timeout=0.3)
        await eventually(lambda: door.num_worker_sessions == 0, "no work is left")


async def test_a_request_that_is_cancelled_ends_its_work() -> None:
    async with running_front_door() as door, door.openai() as client:
        door.target.hold(num_turns=2)
        task = asyncio.create_task(client.chat.completions.create(model="toy-target", messages=CHAT, max_tokens=40))
        await eventually(lambda: door.target.num_sessions > 0, "the request is under way")
        task.cancel()
        await eventually(lambda: door.num_worker_sessions == 0, "no work is left")


async def test_a_request_that_is_cancelled_while_it_waits_leaves_the_queue() -> None:
    async with running_front_door(max_sessions=1) as door, door.openai() as client:
        door.target.hold(num_turns=1)
        first = asyncio.create_task(client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=4))
        await eventually(lambda: door.target.num_sessions == 1, "the first request is under way")
        second = asyncio.create_task(client.completions.create(model="toy-target", prompt=PROMPT, stream=True))
        await eventually(lambda: door.coordinator.num_waiting == 1, "the second request waits")
        second.cancel()
        await eventually(lambda: door.coordinator.num_waiting == 0, "nobody waits")
        door.target.release()
        await first


async def test_a_stream_that_is_closed_ends_its_work_within_a_step() -> None:
    target = ScriptedTarget(turn_s=0.02)
    async with running_front_door(target) as door, door.openai() as client:
        stream = await client.completions.create(
            model="toy-target", prompt=PROMPT, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        num_turns = target.num_turns
        await stream.close()
        await eventually(lambda: door.num_worker_sessions == 0, "no work is left")
        assert target.num_turns <= num_turns + 3  # one under way, one to notice, and what came before the close


async def test_the_request_id_is_taken_and_sent_back(web: httpx.AsyncClient) -> None:
    given = {"x-request-id": "mine-1"}
    answer = await web.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}, headers=given)
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"
    refused = await web.post("/v1/completions", json={"prompt": ""}, headers=given)
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine-1")
    assert (await web.get("/health")).headers["x-request-id"]
    assert (await web.get("/health", headers={"x-request-id": "a b"})).status_code == 400


async def test_a_chat_goes_on_with_the_answer_as_it_came(client: AsyncOpenAI) -> None:
    question = {"role": "user", "content": PROMPT}
    answer = await client.chat.completions.create(model="toy-target", messages=[question], max_tokens=4)  # type: ignore[list-item]
    said = answer.choices[0].message
    for form in (said, said.model_dump(), said.model_dump(exclude_none=True)):
        again = await client.chat.completions.create(
            model="toy-target",
            messages=[question, form, question],  # type: ignore[list-item]
            max_tokens=4,
        )
        assert again.usage is not None
        assert answer.usage is not None
        assert again.usage.prompt_tokens > answer.usage.prompt_tokens
