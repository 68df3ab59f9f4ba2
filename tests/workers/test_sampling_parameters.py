"""Every sampling parameter, plain and speculative, greedy and sampled, alone and in company: the reference's tokens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping

import pytest

from coordinator.coordinator import Coordinator
from coordinator.events import TokensEvent
from coordinator.requests import GenerateRequest, SpeculationOptions
from tests.doubles import reference
from tests.doubles.tiny_models import VOCAB_SIZE, byte_level_tokenizer
from tests.workers.test_exactness import stack

MAX_TOKENS = 20
PROMPTS = [tuple(random.Random(seed).choices(range(1, VOCAB_SIZE), k=9)) for seed in range(4)]
WAYS = {
    "plain": SpeculationOptions(disabled=True),
    # takes turns, so that drafts are there on any machine
    "speculative": SpeculationOptions(policy="fixed", k=5, turns=True),
    "streamed": SpeculationOptions(policy="fixed", k=5),
}
ASKED: Mapping[str, dict[str, object]] = {
    "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": -1.2},
    "all_penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.7, "frequency_penalty": 0.9},
    "logit_bias": {"logit_bias": ((0, 6.0), (7, -100.0), (40, 7.0))},
    "bad_words": {"bad_words": tuple(chr(code) for code in range(ord("a"), ord("v")))},
    "min_tokens": {"min_tokens": 12, "logit_bias": ((0, 12.0),)},
    "everything": {
        "top_k": 50,
        "top_p": 0.97,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "logit_bias": ((0, 9.0), (3, -2.0)),
        "bad_words": ("fi", "x"),
        "min_tokens": 7,
    },
}


def reference_parameters(asked: Mapping[str, object], temperature: float, seed: int) -> reference.Parameters:
    tokenizer = byte_level_tokenizer()
    words = asked.get("bad_words", ())
    assert isinstance(words, tuple)
    found = [tuple(tokenizer.encode(text).ids) for word in words for text in (word, f" {word}")]
    merged = [ids for ids in found if ids[0] != tokenizer.token_to_id("Ġ")]  # a space of its own is no other word
    given = {key: value for key, value in asked.items() if key != "bad_words"}
    return reference.Parameters(temperature=temperature, seed=seed, bad_words=tuple(merged), **given)  # type: ignore[arg-type]


async def tokens_of(coordinator: Coordinator, request: GenerateRequest) -> list[int]:
    events = [event async for event in coordinator.generate(request)]
    return [piece.token_id for event in events if isinstance(event, TokensEvent) for piece in event.tokens]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ASKED)
async def test_the_same_tokens_whichever_way(
    make_runtime, model_folders, target_model, name: str, temperature: float
) -> None:
    asked = ASKED[name]
    parameters = [reference_parameters(asked, temperature, seed) for seed in range(len(PROMPTS))]
    expected = [
        reference.decode(target_model, prompt, parameters[index], MAX_TOKENS, stop_token_ids=(0,))
        for index, prompt in enumerate(PROMPTS)
    ]
    without = [
        reference.decode(target_model, prompt, reference.Parameters(temperature, seed=index), MAX_TOKENS, (0,))
        for index, prompt in enumerate(PROMPTS)
    ]
    assert expected != without or (name, temperature) == ("min_p", 0.0), "what changes nothing proves little"

    def request(index: int, way: str) -> GenerateRequest:
        return GenerateRequest(
            PROMPTS[index],
            max_tokens=MAX_TOKENS,
            temperature=temperature,
            seed=index,
            speculation=WAYS[way],
            **asked,  # type: ignore[arg-type]
        )

    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        for way in WAYS:
            alone = [await tokens_of(coordinator, request(index, way)) for index in range(len(PROMPTS))]
            assert alone == expected, way
            together = await asyncio.gather(*(tokens_of(coordinator, request(i, way)) for i in range(len(PROMPTS))))
            assert together == expected, way
