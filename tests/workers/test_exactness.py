"""The promise: with speculation, without it, and by an independent reference, the same tokens.

The whole stack in one process: both engines on their threads, the coordinator, the session cores, in every respect but
the socket what runs in production. Between coordinator and drafter sits chaos.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from transformers import LlamaForCausalLM

from coordinator.clients import DraftClient
from coordinator.coordinator import Coordinator
from coordinator.events import FinishedEvent, TokensEvent
from coordinator.in_process import InProcessClient
from coordinator.metrics import CoordinatorMetrics
from coordinator.requests import GenerateRequest, SpeculationOptions
from coordinator.settings import CoordinatorSettings
from draft_worker.engine import DraftEngine
from grammar import GrammarCompiler
from inference import ModelThread, PagedRuntime, load_tokenizer_json
from rpc.draft_codec import DraftFrame
from rpc.engine_host import EngineHost
from rpc.worker_process import describe_model
from speculation.messages import DraftCommand, TargetCommand, TargetFrame
from speculation.session_stats import SessionStats
from target_worker.engine import VerifyEngine
from target_worker.metrics import TargetMetrics
from tests.doubles import reference
from tests.doubles.chaos import ChaosDraftClient
from tests.doubles.tiny_models import VOCAB_SIZE
from tests.workers.deployment import Facts

MAX_TOKENS = 24
NUM_COMBINATIONS = 216
WAYS = [("fixed", k) for k in range(9)] + [("threshold", 8), ("goodput", 8), ("goodput", 3)]


@dataclass(frozen=True)
class Combination:
    prompt: tuple[int, ...]
    parameters: reference.Parameters


def combinations() -> list[Combination]:
    """Prompts of 1 to 60 tokens under every pair of temperature and top-p, greedy included."""
    rng = random.Random(7)
    found = []
    for index in range(NUM_COMBINATIONS):
        temperature = (0.0, 0.5, 0.8, 1.0, 1.3, 2.0)[index % 6]
        top_p = (1.0, 0.9, 0.5)[index // 6 % 3]
        top_k = (0, 0, 0, 12)[index // 18 % 4]
        prompt = tuple(rng.choices(range(1, VOCAB_SIZE), k=rng.randint(1, 60)))
        found.append(Combination(prompt, reference.Parameters(temperature, top_k, top_p, rng.getrandbits(64))))
    return found


COMBINATIONS = combinations()


@functools.cache
def expected(model: LlamaForCausalLM, index: int) -> list[int]:
    combination = COMBINATIONS[index]
    return reference.decode(model, combination.prompt, combination.parameters, MAX_TOKENS, stop_token_ids=(0,))


@asynccontextmanager
async def stack(
    make_runtime: Callable[..., PagedRuntime],
    model_folders: dict[str, object],
    drafter: str,
    chaos: bool,
    max_step_tokens: int = 64,
    metrics: CoordinatorMetrics | None = None,
    target_metrics: TargetMetrics | None = None,
    wire: Callable[[DraftClient], DraftClient] = lambda client: client,
) -> AsyncIterator[tuple[Coordinator, ChaosDraftClient | None]]:
    """A coordinator over a real target and a real drafter, in this process; ``wire`` stands before the drafter."""
    tokenizer_json = load_tokenizer_json(str(model_folders["target"]))
    target_runtime, draft_runtime = make_runtime("target"), make_runtime(drafter)
    target_grammars, draft_grammars = (GrammarCompiler(tokenizer_json, VOCAB_SIZE, (0,)) for _ in range(2))
    target_engine = VerifyEngine(
        target_runtime, VOCAB_SIZE, max_step_tokens, grammars=target_grammars, metrics=target_metrics
    )
    draft_engine = DraftEngine(draft_runtime, VOCAB_SIZE, max_step_tokens, flush_tokens=2, grammars=draft_grammars)
    info = describe_model(Facts(), tokenizer_json)
    target: EngineHost[TargetCommand, TargetFrame] = EngineHost(
        info, tokenizer_json.encode(), functools.partial(ModelThread, target_engine, woken_by=target_grammars)
    )
    draft: EngineHost[DraftCommand, DraftFrame] = EngineHost(
        info, tokenizer_json.encode(), functools.partial(ModelThread, draft_engine, woken_by=draft_grammars)
    )
    draft_client = InProcessClient(draft, "draft")
    chaos_client = ChaosDraftClient(draft_client, seed=3, vocab_size=VOCAB_SIZE) if chaos else None
    settings = CoordinatorSettings(targets=("in-process:0",), max_sessions=8)
    drafts = [wire(chaos_client or draft_client)]
    coordinator = Coordinator(settings, [InProcessClient(target, "target")], drafts, metrics=metrics)
    await coordinator.start()
    try:
        yield coordinator, chaos_client
    finally:
        await coordinator.close()
        await target.stop()
        await draft.stop()
        for runtime in (target_runtime, draft_runtime):
            runtime.check_integrity()


async def generate(
    coordinator: Coordinator, combination: Combination, speculation: SpeculationOptions
) -> tuple[list[int], SessionStats]:
    parameters = combination.parameters
    request = GenerateRequest(
        combination.prompt,
        max_tokens=MAX_TOKENS,
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        seed=parameters.seed,
        speculation=speculation,
    )
    tokens: list[int] = []
    stats = SessionStats()
    async for event in coordinator.generate(request):
        if isinstance(event, TokensEvent):
            tokens += [piece.token_id for piece in event.tokens]
        elif isinstance(event, FinishedEvent):
            stats = event.stats
    return tokens, stats


def add_up(parts: list[SessionStats]) -> tuple[int, int]:
    return sum(stats.num_drafted for stats in parts), sum(stats.num_accepted for stats in parts)


async def run_all(
    coordinator: Coordinator, model: LlamaForCausalLM, ways: list[SpeculationOptions], concurrency: int = 6
) -> list[SessionStats]:
    """Every combination once, each in the next of ``ways``, several at a time; checks each against the reference."""
    gate = asyncio.Semaphore(concurrency)

    async def one(index: int) -> SessionStats:
        async with gate:
            tokens, stats = await generate(coordinator, COMBINATIONS[index], ways[index % len(ways)])
        assert tokens == expected(model, index), f"combination {index} under {ways[index % len(ways)]}"
        return stats

    return await asyncio.gather(*(one(index) for index in range(NUM_COMBINATIONS)))


def speculating() -> list[SpeculationOptions]:
    return [SpeculationOptions(policy=policy, k=k) for policy, k in WAYS]


async def test_plain_decoding_is_the_reference(make_runtime, model_folders, target_model) -> None:
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        stats = await run_all(coordinator, target_model, [SpeculationOptions(disabled=True)])
    assert add_up(stats) == (0, 0)


@pytest.mark.parametrize("shift", range(3))
async def test_every_k_and_policy_with_a_good_drafter(make_runtime, model_folders, target_model, shift: int) -> None:
    ways = speculating()[shift * 4 :] + speculating()[: shift * 4]  # so that each combination meets several ways
    # The target is as fast as its drafter here: only one that waits for drafts is certain to have some on any machine.
    ways += [SpeculationOptions(policy="fixed", k=k, turns=True) for k in (3, 5)]
    async with stack(make_runtime, model_folders, "close", chaos=False) as (coordinator, _):
        num_drafted, num_accepted = add_up(await run_all(coordinator, target_model, ways))
    assert num_accepted > 0.4 * num_drafted > 100, "the drafter should be of use, or the test proves little"


async def test_proposals_lost_repeated_delayed_reordered_and_made_up(make_runtime, model_folders, target_model) -> None:
    async with stack(make_runtime, model_folders, "close", chaos=True) as (coordinator, chaos):
        stats = await run_all(coordinator, target_model, speculating())
        num_drafted, num_accepted = add_up(stats)
        assert 0 < num_accepted < num_drafted
        assert chaos is not None
        assert chaos.num_lost == 0 or sum(part.num_draft_losses for part in stats) > 0


async def test_a_drafter_that_is_always_wrong(make_runtime, model_folders, target_model) -> None:
    async with stack(make_runtime, model_folders, "wrong", chaos=False) as (coordinator, _):
        num_drafted, num_accepted = add_up(await run_all(coordinator, target_model, speculating()))
    assert num_accepted < 0.1 * num_drafted


@pytest.mark.parametrize("drafter", ["close", "wrong"])
async def test_taking_turns(make_runtime, model_folders, target_model, drafter: str) -> None:
    ways = [SpeculationOptions(policy=policy, k=k, turns=True) for policy, k in WAYS]
    async with stack(make_runtime, model_folders, drafter, chaos=False) as (coordinator, _):
        stats = await run_all(coordinator, target_model, ways)
    assert add_up(stats)[0] > 0  # few if wrong: the planner trims what has no chance


async def test_one_at_a_time_in_small_steps(make_runtime, model_folders, target_model) -> None:
    ways = [SpeculationOptions(policy="fixed", k=5)]
    async with stack(make_runtime, model_folders, "close", chaos=False, max_step_tokens=16) as (coordinator, _):
        await run_all(coordinator, target_model, ways, concurrency=1)
