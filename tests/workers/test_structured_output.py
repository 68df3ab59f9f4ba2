"""A grammar changes what is said, speculation still does not: the tokens are those of an independent reference."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from coordinator.coordinator import Coordinator
from coordinator.events import FinishedEvent, TokensEvent
from coordinator.requests import GenerateRequest, SpeculationOptions
from grammar import GrammarCompiler
from inference import load_tokenizer_json
from rpc.engine_host import ConnectionId, Submitted
from rpc.errors import InvalidRequest
from speculation.messages import CloseSession, FinishReason, Grammar, OpenTarget, Sampling, SessionId, Verdict
from speculation.session_stats import SessionStats
from target_worker.engine import VerifyEngine
from tests.doubles import grammars, reference
from tests.doubles.tiny_models import VOCAB_SIZE
from tests.grammar.test_compiler import GatedCompiler
from tests.workers.test_exactness import stack

NUM_REQUESTS = 48
MAX_TOKENS = 90
WAYS = [SpeculationOptions(disabled=True), SpeculationOptions(policy="goodput", k=8)]
WAYS += [SpeculationOptions(policy="fixed", k=k) for k in (1, 3, 8)]
TURNS = [SpeculationOptions(policy="fixed", k=k, turns=True) for k in (2, 6)]


@dataclass(frozen=True)
class Asked:
    prompt: tuple[int, ...]
    parameters: reference.Parameters
    grammar: Grammar | None


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: FinishReason | None = None
    stats: SessionStats = field(default_factory=SessionStats)


def all_asked() -> list[Asked]:
    """Each grammar, and one request in four without, under greedy and sampled settings."""
    rng = random.Random(11)
    found = []
    for index in range(NUM_REQUESTS):
        temperature, top_k, top_p = ((0.0, 0, 1.0), (0.8, 0, 1.0), (1.0, 5, 1.0), (1.2, 0, 0.9))[index // 4 % 4]
        prompt = tuple(rng.choices(range(1, VOCAB_SIZE), k=rng.randint(1, 40)))
        grammar = (*grammars.GRAMMARS, None)[index % 4]
        rules: dict[str, Any] = {}
        if index // 16 % 3 == 2:  # the last is more than some answers have room for: there the grammar is stronger
            rules = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 40}
        found.append(
            Asked(prompt, reference.Parameters(temperature, top_k, top_p, rng.getrandbits(64), **rules), grammar)
        )
    return found


@pytest.fixture(scope="module")
def expected(target_model: LlamaForCausalLM, model_folders: dict[str, object]) -> dict[Asked, list[int]]:
    tokenizer_json = load_tokenizer_json(str(model_folders["target"]))
    known: dict[Grammar | None, Callable[[Sequence[int]], np.ndarray] | None] = {None: None}
    for grammar in grammars.GRAMMARS:
        known[grammar] = grammars.from_scratch(grammar, tokenizer_json, VOCAB_SIZE)
    return {
        asked: reference.decode(
            target_model, asked.prompt, asked.parameters, MAX_TOKENS, stop_token_ids=(0,), allowed=known[asked.grammar]
        )
        for asked in all_asked()
    }


async def generate(coordinator: Coordinator, asked: Asked, way: SpeculationOptions) -> Answer:
    request = GenerateRequest(
        asked.prompt,
        max_tokens=MAX_TOKENS,
        temperature=asked.parameters.temperature,
        top_k=asked.parameters.top_k,
        top_p=asked.parameters.top_p,
        seed=asked.parameters.seed,
        repetition_penalty=asked.parameters.repetition_penalty,
        frequency_penalty=asked.parameters.frequency_penalty,
        min_tokens=asked.parameters.min_tokens,
        structured_output=asked.grammar,
        speculation=way,
    )
    answer = Answer()
    async for event in coordinator.generate(request):
        if isinstance(event, TokensEvent):
            answer.tokens += [piece.token_id for piece in event.tokens]
            answer.text += event.text
        elif isinstance(event, FinishedEvent):
            answer.reason, answer.stats = event.finish_reason, event.stats
    return answer


async def run_all(
    coordinator: Coordinator, expected: dict[Asked, list[int]], ways: list[SpeculationOptions], concurrency: int
) -> int:
    """Every request once, several at a time; checks each, and counts the accepted tokens."""
    gate = asyncio.Semaphore(concurrency)

    async def one(index: int, asked: Asked) -> int:
        async with gate:
            answer = await generate(coordinator, asked, ways[(index // 4 + index) % len(ways)])
        assert answer.tokens == expected[asked], f"request {index}"
        if asked.grammar is not None and answer.reason is FinishReason.STOP:
            assert grammars.fits(asked.grammar, answer.text)
        return answer.stats.num_accepted

    return sum(await asyncio.gather(*(one(index, asked) for index, asked in enumerate(expected))))


@pytest.mark.parametrize("drafter", ["close", "wrong"])
@pytest.mark.parametrize("concurrency", [1, 6])
async def test_same_tokens_as_plain_decoding_under_the_same_grammar(
    make_runtime, model_folders, expected, drafter: str, concurrency: int
) -> None:
    async with stack(make_runtime, model_folders, drafter, chaos=False) as (coordinator, _):
        num_accepted = await run_all(coordinator, expected, [*WAYS, *TURNS], concurrency)
    assert num_accepted > 100  # under a grammar even a wrong drafter is often right


async def test_made_up_proposals_are_cut_where_the_grammar_forbids_them(make_runtime, model_folders, expected) -> None:
    async with stack(make_runtime, model_folders, "close", chaos=True) as (coordinator, _):
        await run_all(coordinator, expected, WAYS, concurrency=6)


@pytest.mark.parametrize("drafter", ["close", "wrong"])
@pytest.mark.parametrize("method", ["rejection", "block"])
async def test_methods_of_verification_say_only_what_the_grammar_allows(
    make_runtime, model_folders, expected, drafter: str, method: str
) -> None:
    """Their tokens need not be those of plain decoding; each has to be allowed where it is."""
    tokenizer_json = load_tokenizer_json(str(model_folders["target"]))
    sampled = [asked for asked in expected if asked.grammar is not None and asked.parameters.temperature > 0]
    has_chaos = drafter == "wrong"  # with it, and where nobody waits for drafts, few may be in time on a busy machine
    way = SpeculationOptions(policy="fixed", k=4, method=method, turns=not has_chaos)
    async with stack(make_runtime, model_folders, drafter, chaos=has_chaos) as (coordinator, _):
        answers = await asyncio.gather(*(generate(coordinator, asked, way) for asked in sampled))
    for asked, answer in zip(sampled, answers, strict=True):
        allowed = grammars.from_scratch(asked.grammar, tokenizer_json, VOCAB_SIZE)
        said = [token_id for token_id in answer.tokens if token_id != 0]
        assert all(allowed(said[:index])[token_id] for index, token_id in enumerate(said))
        assert answer.reason is not FinishReason.STOP or grammars.fits(asked.grammar, answer.text)
    assert sum(answer.stats.num_drafted for answer in answers) > (0 if has_chaos else 100)


async def test_a_short_budget_cuts_the_answer(make_runtime, model_folders, expected) -> None:
    asked = next(asked for asked in expected if asked.grammar is grammars.GRAMMARS[0])
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        events = [
            event
            async for event in coordinator.generate(
                GenerateRequest(asked.prompt, max_tokens=4, structured_output=asked.grammar, seed=1)
            )
        ]
    assert isinstance(events[-1], FinishedEvent)
    assert events[-1].finish_reason is FinishReason.LENGTH


async def test_bad_grammars_are_refused_before_any_worker_is_asked(make_runtime, model_folders) -> None:
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        for grammar, field_name in [
            (Grammar("json_schema", '{"type": "nope"}'), "structured_output.json_schema"),
            (Grammar("regex", "("), "structured_output.regex"),
            (Grammar("ebnf", "root ::= foo"), "structured_output.grammar"),
            (Grammar("", ""), "structured_output"),
        ]:
            with pytest.raises(InvalidRequest) as caught:
                await generate(coordinator, Asked((5,), reference.Parameters(), grammar), WAYS[0])
            assert caught.value.violations[0].field == field_name
        assert coordinator.deployment().traffic.num_target_steps == 0
        request = GenerateRequest((5,), ignore_eos=True, structured_output=grammars.GRAMMARS[0])
        with pytest.raises(InvalidRequest, match="ignore_eos: contradicts structured_output"):
            await anext(coordinator.generate(request))


def test_a_target_that_takes_over_in_mid_answer_goes_on_alike(make_runtime, model_folders, expected) -> None:
    tokenizer_json = load_tokenizer_json(str(model_folders["target"]))
    for asked, answer in list(expected.items())[::5]:
        for num_said in (0, 1, len(answer) // 2, len(answer) - 1):
            compiler = GrammarCompiler(tokenizer_json, VOCAB_SIZE, (0,))
            engine = VerifyEngine(make_runtime(), VOCAB_SIZE, 64, grammars=compiler)
            parameters = asked.parameters
            sampling = Sampling(
                parameters.temperature,
                parameters.top_k,
                parameters.top_p,
                parameters.seed,
                repetition_penalty=parameters.repetition_penalty,
                frequency_penalty=parameters.frequency_penalty,
                min_length=len(asked.prompt) + parameters.min_tokens if parameters.min_tokens else 0,
                prompt_length=len(asked.prompt),
                grammar=asked.grammar,
            )
            said = (*asked.prompt, *answer[:num_said])
            command = OpenTarget(said, sampling, len(asked.prompt) + MAX_TOKENS, (0,), 0)
            assert run_alone(engine, command) == answer[num_said:]


def run_alone(engine: VerifyEngine, command: OpenTarget, session: int = 1) -> list[int]:
    """All tokens that an engine says after ``command``."""
    engine.apply([Submitted(ConnectionId(1), [(SessionId(session), command)], 0.0)])
    tokens: list[int] = []
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        for _, frame in engine.step().outputs:
            for _, event in frame.items:
                assert isinstance(event, Verdict), event
                tokens += event.token_ids
                if event.finish_reason is not None:
                    return tokens
    raise AssertionError("the engine does not come to an end")


def test_a_session_whose_grammar_is_compiled_delays_nobody(make_runtime, model_folders) -> None:
    compiler = GatedCompiler()
    engine = VerifyEngine(make_runtime(), VOCAB_SIZE, 64, grammars=compiler)
    bound = OpenTarget((5,), Sampling(prompt_length=1, grammar=Grammar("regex", "x")), 9, (0,), 0)
    engine.apply([Submitted(ConnectionId(1), [(SessionId(1), bound)], 0.0)])
    assert engine.step().wait_s is None  # until somebody wakes it
    assert len(run_alone(engine, OpenTarget((5,), Sampling(), 9, (0,), 0), 2)) > 0
    engine.apply([Submitted(ConnectionId(1), [(SessionId(1), CloseSession())], 0.0)])
    compiler.gate.set()


async def test_each_of_several_answers_has_a_path_of_its_own(make_runtime, model_folders) -> None:
    grammar = grammars.GRAMMARS[0]
    request = GenerateRequest(
        tuple(range(1, 30)), max_tokens=MAX_TOKENS, temperature=1.2, seed=3, n=4, structured_output=grammar
    )
    texts, reasons = [""] * 4, {}
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        async for event in coordinator.generate(request):
            if isinstance(event, TokensEvent):
                texts[event.choice] += event.text
            elif isinstance(event, FinishedEvent):
                reasons[event.choice] = event.finish_reason
    finished = [texts[choice] for choice, reason in reasons.items() if reason is FinishReason.STOP]
    assert len(reasons) == 4
    assert len(set(finished)) > 1
    assert all(grammars.fits(grammar, text) for text in finished)
