"""Several answers, stop strings and logprobs, as the official client sees them."""

from __future__ import annotations

from collections import defaultdict

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.http.conftest import PROMPT, text_of
from tests.http.test_completions import said

CHAT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "abc"}]
GO_ON = {"ignore_eos": True}


async def test_n_answers_to_each_prompt_in_their_order(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="toy-target", prompt=["abc", "a"], n=3, max_tokens=9)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    alone = await client.completions.create(model="toy-target", prompt="a", max_tokens=9)
    assert [choice.text for choice in answer.choices[3:]] == [alone.choices[0].text] * 3  # the toy knows no seed
    assert answer.usage is not None
    assert alone.usage is not None
    assert answer.usage.prompt_tokens == 3 + 1  # a prompt counts once


async def test_n_answers_in_one_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="toy-target", messages=CHAT, n=3, max_tokens=12, stream=True, extra_body=GO_ON
    )
    whole = await client.chat.completions.create(
        model="toy-target", messages=CHAT, n=3, max_tokens=12, extra_body=GO_ON
    )
    texts: defaultdict[int, list[str | None]] = defaultdict(list)
    roles, ends = [], []
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index].append(choice.delta.content)
            roles += [choice.index] if choice.delta.role else []
            ends += [choice.index] if choice.finish_reason else []
    assert {index: text_of(parts) for index, parts in texts.items()} == {
        choice.index: choice.message.content for choice in whole.choices
    }
    assert sorted(roles) == sorted(ends) == [0, 1, 2]


async def test_stop_strings_end_the_text_before_them(client: AsyncOpenAI) -> None:
    stop = said(40)[10:13]
    cut = said(40)[: said(40).index(stop)]
    for streamed in (False, True):
        text, reasons = await completed(client, streamed, stop=[stop], extra_body=GO_ON)
        assert text == cut
        assert reasons == ["stop"]
    text, _ = await completed(client, False, stop=stop, extra_body={**GO_ON, "include_stop_str_in_output": True})
    assert text == cut + stop


async def completed(client: AsyncOpenAI, streamed: bool, **fields: object) -> tuple[str, list[str]]:
    """Text and reasons to end, whichever way they come."""
    given = {"model": "toy-target", "prompt": PROMPT, "max_tokens": 40, **fields}
    if not streamed:
        [choice] = (await client.completions.create(**given)).choices  # type: ignore[call-overload]
        return choice.text, [choice.finish_reason]
    stream = await client.completions.create(**given, stream=True)  # type: ignore[call-overload]
    choices = [choice async for chunk in stream for choice in chunk.choices]
    return text_of([choice.text for choice in choices]), [c.finish_reason for c in choices if c.finish_reason]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"n": 2, "best_of": 3}, "best_of"),
    ],
)
async def test_values_out_of_range_name_their_field(client: AsyncOpenAI, fields: dict[str, object], field: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="toy-target", prompt=PROMPT, extra_body=fields)
    assert refused.value.param == field


async def test_too_many_top_logprobs_name_their_field(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="toy-target", messages=CHAT, logprobs=True, top_logprobs=21)
    assert refused.value.param == "top_logprobs"
