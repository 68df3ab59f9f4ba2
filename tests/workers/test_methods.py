"""Every sampling parameter under every method, greedy and sampled, alone and in a batch, through the whole stack."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from coordinator.coordinator import Coordinator
from coordinator.events import FinishedEvent, TokensEvent
from coordinator.requests import GenerateRequest, SpeculationOptions
from inference import sampling as inference_sampling
from speculation import messages
from speculation.draft_distribution import WEIGHT_TOTAL, DraftDistribution
from speculation.fingerprint import fingerprint
from speculation.messages import FinishReason, LogprobOptions, Method, OpenTarget, Proposal, Sampling
from speculation.session_stats import SessionStats
from tests.doubles import reference
from tests.doubles.tiny_models import VOCAB_SIZE
from tests.workers.test_exactness import stack
from tests.workers.test_target_engine import Harness, prompt_of

MAX_TOKENS = 20
SEEDS = range(3)
STOP_TOKENS = tuple(range(1, VOCAB_SIZE, 9))
PARAMETERS = {
    "temperature": reference.Parameters(0.8),
    "top-k": reference.Parameters(1.0, top_k=12),
    "top-p": reference.Parameters(1.0, top_p=0.8),
    "all": reference.Parameters(1.3, top_k=40, top_p=0.9),
    "penalties": reference.Parameters(1.0, repetition_penalty=1.3, frequency_penalty=0.5),
}
METHODS = {
    "plain": SpeculationOptions(disabled=True),
    "coupled": SpeculationOptions(policy="fixed", k=4, turns=True, method="coupled"),
    "rejection": SpeculationOptions(policy="fixed", k=4, turns=True, method="rejection"),
    "block": SpeculationOptions(policy="fixed", k=4, turns=True, method="block"),
    "rejection, greedy draft": SpeculationOptions(policy="fixed", k=4, turns=True, method="rejection", draft_top_n=1),
    "block, streaming": SpeculationOptions(k=4, method="block", draft_top_n=8),
}


@dataclass(frozen=True)
class Answer:
    prompt: tuple[int, ...]
    parameters: reference.Parameters
    stop: tuple[int, ...]
    tokens: list[int]
    finish_reason: FinishReason
    stats: SessionStats


async def ask(
    coordinator: Coordinator, parameters: reference.Parameters, stop: tuple[int, ...], way: SpeculationOptions
) -> Answer:
    prompt = tuple(prompt_of(12, seed=parameters.seed))
    request = GenerateRequest(
        prompt,
        max_tokens=MAX_TOKENS,
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        repetition_penalty=parameters.repetition_penalty,
        frequency_penalty=parameters.frequency_penalty,
        seed=parameters.seed,
        stop_token_ids=stop,
        speculation=way,
    )
    tokens: list[int] = []
    async for event in coordinator.generate(request):
        if isinstance(event, TokensEvent):
            tokens += [piece.token_id for piece in event.tokens]
        elif isinstance(event, FinishedEvent):
            return Answer(prompt, parameters, stop, tokens, event.finish_reason, event.stats)
    raise AssertionError("no last event")


def requests(is_greedy: bool) -> list[tuple[reference.Parameters, tuple[int, ...]]]:
    """Each parameter with some seeds, with and without stop tokens of the request's own."""
    return [
        (replace(one, temperature=0.0 if is_greedy else one.temperature, seed=seed), stop)
        for one in PARAMETERS.values()
        for seed in SEEDS
        for stop in ((), STOP_TOKENS)
    ]


def expected(model: LlamaForCausalLM, answer: Answer) -> list[int]:
    return reference.decode(model, answer.prompt, answer.parameters, MAX_TOKENS, (0, *answer.stop))


@torch.inference_mode()
def check_possible(model: LlamaForCausalLM, answer: Answer) -> None:
    """Every token is one that its parameters allow at its place, and nothing follows a stop token."""
    token_ids = [*answer.prompt, *answer.tokens]
    logits = model(torch.tensor([token_ids]), use_cache=False).logits[0].float().numpy()
    for index, token in enumerate(answer.tokens, len(answer.prompt)):
        output = token_ids[len(answer.prompt) : index]
        adjusted = reference.adjust(logits[index - 1], answer.parameters, answer.prompt, output, (0, *answer.stop))
        assert token in _allowed(adjusted, answer.parameters)
    stops = {0, *answer.stop}
    assert not stops.intersection(answer.tokens[:-1])
    has_stopped = answer.tokens[-1] in stops
    assert answer.finish_reason is (FinishReason.STOP if has_stopped else FinishReason.LENGTH)
    assert has_stopped or len(answer.tokens) == MAX_TOKENS


def _allowed(logits: np.ndarray, parameters: reference.Parameters) -> set[int]:
    scores = logits / np.float32(parameters.temperature)
    order = np.argsort(-scores, kind="stable")
    if parameters.min_p:
        order = order[scores[order] >= scores.max() + np.log(parameters.min_p) - 1e-6]
    order = order[: parameters.top_k or None]
    p = np.exp(scores[order].astype(np.float64) - scores[order].max())
    p /= p.sum()
    return set(order[np.cumsum(p) - p < parameters.top_p + 1e-6].tolist())


@pytest.mark.parametrize("num_together", [1, 8], ids=["alone", "batched"])
@pytest.mark.parametrize("is_greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
async def test_parameters(
    make_runtime, model_folders, target_model, method: str, is_greedy: bool, num_together: int
) -> None:
    gate = asyncio.Semaphore(num_together)
    way = METHODS[method]

    async def one(parameters: reference.Parameters, stop: tuple[int, ...]) -> Answer:
        async with gate:
            return await ask(coordinator, parameters, stop, way)

    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        answers = await asyncio.gather(*(one(*request) for request in requests(is_greedy)))
    by_ratio = not is_greedy and way.method in {"rejection", "block"}
    for answer in answers:
        if by_ratio:
            check_possible(target_model, answer)
        else:
            assert answer.tokens == expected(target_model, answer)
    q_bytes = sum(answer.stats.q_bytes_relayed for answer in answers)
    assert bool(q_bytes) == (by_ratio and way.draft_top_n != 1)
    if way.turns:
        assert sum(answer.stats.num_accepted for answer in answers) > 0


@pytest.mark.parametrize("method", ["rejection", "block"])
async def test_a_wrong_drafter_over_a_hostile_wire(make_runtime, model_folders, target_model, method: str) -> None:
    async with stack(make_runtime, model_folders, "wrong", chaos=True) as (coordinator, _):
        way = SpeculationOptions(policy="fixed", k=4, method=method)
        for answer in await asyncio.gather(*(ask(coordinator, *one, way) for one in requests(is_greedy=False))):
            check_possible(target_model, answer)


@pytest.mark.parametrize("method", [Method.REJECTION, Method.BLOCK])
def test_given_its_drafts_a_session_says_the_same_alone_and_in_a_batch(make_runtime, method: Method) -> None:
    def drafts_for(session: int, prompt: list[int]) -> Proposal:
        rng = np.random.default_rng(session)
        tokens = rng.choice(VOCAB_SIZE, size=3, replace=False).tolist()
        ids = tuple(tokens)
        q = DraftDistribution(ids, (WEIGHT_TOTAL - 2000, 1500, 500))
        return Proposal(len(prompt), fingerprint(prompt), (ids[0], ids[1]), (1.0, 1.0), distributions=(q, q))

    def run(sessions: list[int]) -> dict[int, list[int]]:
        harness = Harness(make_runtime())
        for session in sessions:
            prompt = prompt_of(9, seed=session)
            sampling = Sampling(1.5, seed=session, method=method, draft_top_n=3)
            harness.tokens[session], harness.verdicts[session] = [], []
            opening = OpenTarget(
                tuple(prompt), sampling, len(prompt) + 4, (), 4, logprobs=LogprobOptions(1, processed=True)
            )
            harness.send(session, opening, drafts_for(session, prompt))
        harness.run()
        for verdict in itertools.chain.from_iterable(harness.verdicts.values()):
            assert len(verdict.logprobs) == len(verdict.token_ids)
            assert all(one.logprob <= 0 for one in verdict.logprobs)
        return harness.tokens

    sessions = list(range(1, 9))
    together = run(sessions)
    assert together == {session: run([session])[session] for session in sessions}
    assert len({tuple(tokens) for tokens in together.values()}) == len(sessions)


async def test_requests_without_a_seed_share_no_draws(make_runtime, model_folders) -> None:
    async def one() -> tuple[int, ...]:
        way = SpeculationOptions(policy="fixed", k=4, method="rejection")
        request = GenerateRequest((5, 6), max_tokens=MAX_TOKENS, temperature=2.0, speculation=way)
        return tuple(
            [t.token_id async for e in coordinator.generate(request) if isinstance(e, TokensEvent) for t in e.tokens]
        )

    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        answers = await asyncio.gather(*(one() for _ in range(6)))
    assert len(set(answers)) == 6


def test_both_sides_agree_on_what_is_greedy() -> None:
    assert messages.GREEDY_BELOW == inference_sampling._GREEDY_BELOW
