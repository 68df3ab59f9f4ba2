"""Every sampling parameter, plain and speculative, greedy and sampled, alone and in company: the reference's tokens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from contextlib import aclosing

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from coordinator.coordinator import Coordinator
from coordinator.events import FinishedEvent, GenerateEvent, StartedEvent, TokensEvent
from coordinator.requests import GenerateRequest, SpeculationOptions
from speculation.fingerprint import Fingerprint, extend
from speculation.messages import TokenLogprobs
from tests.doubles import reference
from tests.doubles.tiny_models import VOCAB_SIZE, byte_level_tokenizer
from tests.workers.test_exactness import stack
from tests.workers.test_methods import Answer, check_possible

MAX_TOKENS = 20
PROMPTS = [tuple(random.Random(seed).choices(range(1, VOCAB_SIZE), k=9)) for seed in range(4)]
WAYS = {
    "plain": SpeculationOptions(disabled=True),
    # takes turns, so that drafts are there on any machine
    "speculative": SpeculationOptions(policy="fixed", k=5, turns=True),
    "streamed": SpeculationOptions(policy="fixed", k=5),
}
RATIO_WAYS = {
    method: SpeculationOptions(policy="fixed", k=5, turns=True, method=method) for method in ("rejection", "block")
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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("way", RATIO_WAYS)
async def test_every_rule_holds_under_the_ratio_methods(
    make_runtime, model_folders, target_model, way: str, temperature: float
) -> None:
    """They keep the distribution and not the tokens, so there are few tokens to choose from, by what is asked."""

    async def one(name: str, index: int) -> Answer:
        asked = {**ASKED[name], "top_k": 4}
        request = GenerateRequest(
            PROMPTS[index],
            max_tokens=MAX_TOKENS,
            temperature=temperature,
            seed=index,
            speculation=RATIO_WAYS[way],
            **asked,  # type: ignore[arg-type]
        )
        events = await events_of(coordinator, request)
        finished = events[-1]
        assert isinstance(finished, FinishedEvent)
        tokens = [piece.token_id for event in events if isinstance(event, TokensEvent) for piece in event.tokens]
        parameters = reference_parameters(asked, temperature, index)
        return Answer(PROMPTS[index], parameters, (), tokens, finished.finish_reason, finished.stats)

    cases = [(name, index) for name in ASKED for index in range(2)]
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        answers = [await one(*case) for case in cases] + await asyncio.gather(*(one(*case) for case in cases))
    for answer in answers:
        if temperature:
            check_possible(target_model, answer)
        else:
            assert answer.tokens == reference.decode(target_model, answer.prompt, answer.parameters, MAX_TOKENS, (0,))
    assert sum(answer.stats.num_accepted for answer in answers) > 0


# -- logprobs -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def full_forward(model: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities of each next token: [len(token_ids), V]."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0].float().log_softmax(-1)


def check(found: TokenLogprobs, row: torch.Tensor, token_id: int, num_top: int) -> None:
    assert found.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
    best = row.topk(num_top)
    assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    for token_id, logprob in found.top:
        assert logprob == pytest.approx(float(row[token_id]), abs=1e-4)


async def events_of(coordinator: Coordinator, request: GenerateRequest) -> list[GenerateEvent]:
    return [event async for event in coordinator.generate(request)]


@pytest.mark.parametrize("num_top", [0, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_logprobs_are_those_of_a_full_forward(
    make_runtime, model_folders, target_model, temperature: float, num_top: int
) -> None:
    prompt = tuple(random.Random(9).choices(range(1, VOCAB_SIZE), k=150))  # more than one step prefills

    def request(way: str) -> GenerateRequest:
        return GenerateRequest(
            prompt,
            max_tokens=MAX_TOKENS,
            temperature=temperature,
            seed=1,
            frequency_penalty=1.0,  # raw logprobs know nothing of it
            logprobs=num_top,
            prompt_logprobs=num_top,
            speculation=ways[way],
        )

    ways = WAYS | RATIO_WAYS
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        for way in ways:
            together = await asyncio.gather(*(events_of(coordinator, request(way)) for _ in range(3)))
            for events in together:
                started, *_ = events
                assert isinstance(started, StartedEvent)
                pieces = [piece for event in events if isinstance(event, TokensEvent) for piece in event.tokens]
                rows = full_forward(target_model, [*prompt, *(piece.token_id for piece in pieces)])
                assert len(started.prompt_logprobs) == len(prompt) - 1
                for index, logprobs in enumerate(started.prompt_logprobs):
                    check(logprobs, rows[index], prompt[index + 1], num_top)
                for index, piece in enumerate(pieces):
                    assert piece.logprobs is not None
                    check(piece.logprobs, rows[len(prompt) - 1 + index], piece.token_id, num_top)
            if ways[way].turns:
                assert any(piece.drafted for piece in pieces), "drafted tokens have logprobs too"


async def test_processed_logprobs_are_of_what_is_drawn_from(make_runtime, model_folders, target_model) -> None:
    parameters = reference.Parameters(0.7, top_k=4, seed=2, frequency_penalty=0.5, logit_bias=((0, -100.0),))
    request = GenerateRequest(
        PROMPTS[0],
        max_tokens=MAX_TOKENS,
        temperature=0.7,
        top_k=4,
        seed=2,
        frequency_penalty=0.5,
        logit_bias=((0, -100.0),),
        logprobs=20,
        logprobs_mode="processed",
        speculation=WAYS["speculative"],
    )
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        events = await events_of(coordinator, request)
    pieces = [piece for event in events if isinstance(event, TokensEvent) for piece in event.tokens]
    said: list[int] = []
    for piece in pieces:
        with torch.inference_mode():
            logits = target_model(torch.tensor([[*PROMPTS[0], *said]]), use_cache=False).logits[0, -1].float().numpy()
        scores = torch.from_numpy(reference.adjust(logits, parameters, PROMPTS[0], said, ()) / np.float32(0.7))
        best = scores.topk(4)
        expected = best.values.log_softmax(-1)
        assert piece.logprobs is not None
        assert [token_id for token_id, _ in piece.logprobs.top] == best.indices.tolist()  # and no impossible ones
        assert [logprob for _, logprob in piece.logprobs.top] == pytest.approx(expected.tolist(), abs=1e-4)
        assert piece.logprobs.logprob == pytest.approx(dict(piece.logprobs.top)[piece.token_id])
        said.append(piece.token_id)


# -- stopping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_stop", [False, True])
@pytest.mark.parametrize("way", WAYS)
async def test_a_stop_string_ends_the_answer_and_nothing_beyond_is_sent(
    make_runtime, model_folders, target_model, way: str, keeps_stop: bool
) -> None:
    tokenizer = byte_level_tokenizer()
    prompt = PROMPTS[1]
    plain = reference.decode(target_model, prompt, reference.Parameters(1.0, seed=4), MAX_TOKENS)
    whole = tokenizer.decode(plain)
    stop = whole[9:13]  # over the borders of tokens
    end = whole.index(stop)
    num_tokens = next(n for n in range(len(plain)) if stop in tokenizer.decode(plain[:n]))
    request = GenerateRequest(
        prompt,
        max_tokens=MAX_TOKENS,
        temperature=1.0,
        seed=4,
        ignore_eos=True,
        stop=["not there", stop],
        include_stop_str_in_output=keeps_stop,
        speculation=WAYS[way],
    )
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        events = await events_of(coordinator, request)
        assert coordinator.num_sessions == 0
    steps = [event for event in events if isinstance(event, TokensEvent)]
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    assert "".join(step.text for step in steps) == whole[: end + len(stop) if keeps_stop else end]
    assert all(step.text == "".join(piece.text for piece in step.tokens) for step in steps if step.tokens)
    assert [piece.token_id for step in steps for piece in step.tokens] == plain[:num_tokens]
    assert (finished.finish_reason.value, finished.stop_reason) == ("stop", stop)
    assert finished.num_completion_tokens == num_tokens


@pytest.mark.parametrize("keeps_stop", [False, True])
async def test_stop_tokens(make_runtime, model_folders, target_model, keeps_stop: bool) -> None:
    tokenizer = byte_level_tokenizer()
    plain = reference.decode(target_model, PROMPTS[1], reference.Parameters(1.0, seed=4), MAX_TOKENS)
    stop = plain[6]
    num_tokens = plain.index(stop) + 1
    request = GenerateRequest(
        PROMPTS[1],
        temperature=1.0,
        seed=4,
        stop_token_ids=[stop],
        include_stop_str_in_output=keeps_stop,
        speculation=WAYS["speculative"],
    )
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        events = await events_of(coordinator, request)
    text = "".join(event.text for event in events if isinstance(event, TokensEvent))
    assert text == tokenizer.decode(plain[: num_tokens if keeps_stop else num_tokens - 1])
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    assert (finished.finish_reason.value, finished.stop_reason) == ("stop", stop)
    assert finished.num_completion_tokens == num_tokens


# -- n ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
async def test_each_of_n_answers_is_a_request_of_its_own(make_runtime, model_folders, target_model, way: str) -> None:
    request = GenerateRequest(
        PROMPTS[2], max_tokens=MAX_TOKENS, temperature=1.0, seed=11, n=5, logprobs=0, speculation=WAYS[way]
    )
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        started, *events = await events_of(coordinator, request)
        assert coordinator.num_sessions == 0
    assert isinstance(started, StartedEvent)
    finished = [event for event in events if isinstance(event, FinishedEvent)]
    assert sorted(event.choice for event in finished) == list(range(5))
    answers = []
    for choice in range(5):
        seed = 11 if choice == 0 else extend(Fingerprint(11), choice)
        steps = [event for event in events if isinstance(event, TokensEvent) and event.choice == choice]
        pieces = [piece for step in steps for piece in step.tokens]
        answers.append([piece.token_id for piece in pieces])
        expected = reference.decode(target_model, PROMPTS[2], reference.Parameters(1.0, seed=seed), MAX_TOKENS, (0,))
        assert answers[-1] == expected
        rows = full_forward(target_model, [*PROMPTS[2], *expected])
        for index, piece in enumerate(pieces):
            assert piece.logprobs is not None
            check(piece.logprobs, rows[len(PROMPTS[2]) - 1 + index], piece.token_id, 0)
    assert len({tuple(answer) for answer in answers}) == 5


async def test_leaving_ends_all_answers(make_runtime, model_folders) -> None:
    request = GenerateRequest(PROMPTS[0], temperature=1.0, seed=1, n=4, ignore_eos=True)
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        async with aclosing(coordinator.generate(request)) as events:
            async for event in events:
                if isinstance(event, TokensEvent):
                    break
        assert coordinator.num_sessions == 0
