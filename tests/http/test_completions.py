"""``/v1/completions`` as the official client sees it."""

from __future__ import annotations

from itertools import pairwise

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.doubles.scripted_workers import TOY_LETTERS
from tests.http.conftest import PROMPT, text_of
from tests.rpc.conftest import spoken


def said(num_tokens: int) -> str:
    """What the toy model says after `PROMPT`, stop tokens without text."""
    letters = " " + TOY_LETTERS
    return "".join(letters[token] for token in spoken([letters.index(c) for c in PROMPT], num_tokens)).replace(" ", "")


async def test_completes_with_the_text_of_plain_decoding(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="toy-target", prompt=PROMPT, max_tokens=40, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == said(40)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 40, 43)


async def test_streams_the_same_text_as_it_sends_whole(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="toy-target",
        prompt=PROMPT,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "speculation": {"trace": True}},
    )
    chunks = [chunk async for chunk in stream]
    assert text_of([choice.text for chunk in chunks for choice in chunk.choices]) == said(40)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 40
    assert chunks[-1].metrics["speculative_decoding"]["num_accepted_tokens"] > 0  # type: ignore[attr-defined]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    traced = [chunk.speculation for chunk in chunks if hasattr(chunk, "speculation")]
    tokens = [token for step in traced for token in step["tokens"]]
    assert len(tokens) == 40
    assert any(token["drafted"] for token in tokens)
    assert not all(token["drafted"] for token in tokens)
    assert any(token["branch"] for token in tokens)
    assert all(token["drafted"] for token in tokens if token["branch"])
    steps = [chunk["step"] for chunk in traced if chunk["tokens"]]
    assert all(earlier["at_s"] < later["at_s"] for earlier, later in pairwise(steps))
    assert any(step["missed"] for step in steps)
    proposals = [proposal for step in steps for proposal in step["proposals"]]
    assert sum(proposal["num_tokens"] for proposal in proposals) >= sum(token["drafted"] for token in tokens)
    assert all(0 < proposal["at_s"] <= step["at_s"] for step in steps for proposal in step["proposals"])


async def test_without_a_trace_nothing_is_told_of_steps(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=20, stream=True)
    assert not any(hasattr(chunk, "speculation") for chunk in [chunk async for chunk in stream])


async def test_several_prompts_are_several_choices(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="toy-target", prompt=["abc", "a", "j"], max_tokens=8)
    alone = [await client.completions.create(model="toy-target", prompt=p, max_tokens=8) for p in ("abc", "a", "j")]
    assert [choice.text for choice in answer.choices] == [one.choices[0].text for one in alone]


@pytest.mark.parametrize("field", ["best_of", "suffix", "echo"])
async def test_what_is_not_served_is_refused_by_name(client: AsyncOpenAI, field: str) -> None:
    value: object = {"best_of": 2, "suffix": "x", "echo": True}[field]
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="toy-target", prompt=PROMPT, extra_body={field: value})
    assert refused.value.param == field


async def test_a_field_that_nobody_knows_is_refused_by_name(web: httpx.AsyncClient) -> None:
    answer = await web.post("/v1/completions", json={"prompt": PROMPT, "max_token": 3})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_token"
