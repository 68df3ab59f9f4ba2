"""A drafter may say anything of what its tokens were drawn from: no answer ends, and no coupled one changes."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest

from coordinator.clients import DraftClient
from coordinator.requests import SpeculationOptions
from tests.doubles import reference
from tests.doubles.liar import LIES, Lie, LyingDraftClient
from tests.workers.test_exactness import stack
from tests.workers.test_methods import PARAMETERS, ask, check_possible, expected

WAYS = [
    SpeculationOptions(policy="fixed", k=4, turns=turns, method=method, draft_top_n=top_n)
    for turns in (True, False)
    for method, top_n in (("coupled", None), ("rejection", None), ("block", 8), ("rejection", 1), ("block", 256))
]


Asked = tuple[reference.Parameters, SpeculationOptions]


def asked() -> list[Asked]:
    """Every way with every parameter, greedy and sampled: mixed in each batch."""
    found = []
    for seed, (parameters, way, is_greedy) in enumerate(itertools.product(PARAMETERS.values(), WAYS, (True, False))):
        found.append((replace(parameters, temperature=0.0 if is_greedy else parameters.temperature, seed=seed), way))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
async def test_no_lie_ends_an_answer_nor_changes_a_coupled_one(
    make_runtime, model_folders, target_model, lie: str
) -> None:
    requests = asked()[list(LIES).index(lie) % 7 :: 7]
    await check(make_runtime, model_folders, target_model, [LIES[lie]], requests)


async def test_all_lies_in_turn(make_runtime, model_folders, target_model) -> None:
    await check(make_runtime, model_folders, target_model, list(LIES.values()), asked()[::11])


async def check(make_runtime, model_folders, target_model, lies: list[Lie], requests: list[Asked]) -> None:
    def wire(client: DraftClient) -> DraftClient:
        return LyingDraftClient(client, lies)

    async with stack(make_runtime, model_folders, "close", chaos=False, wire=wire) as (coordinator, _):
        answers = await asyncio.gather(*(ask(coordinator, parameters, (), way) for parameters, way in requests))
        assert coordinator.num_sessions == 0
    for (parameters, way), answer in zip(requests, answers, strict=True):
        assert answer.stats.num_target_losses == 0
        if way.method == "coupled" or parameters.temperature == 0:
            assert answer.tokens == expected(target_model, answer)
        else:
            check_possible(target_model, answer)
