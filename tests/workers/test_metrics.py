"""What `/metrics` says is what the requests were told, with real engines and whatever becomes of the requests."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from contextlib import aclosing
from dataclasses import fields

import pytest
from prometheus_client import CollectorRegistry

from coordinator.arms import Arm
from coordinator.coordinator import Coordinator
from coordinator.events import FinishedEvent, TokensEvent
from coordinator.metrics import CoordinatorMetrics
from coordinator.requests import GenerateRequest, SpeculationOptions
from coordinator.session import Session
from speculation.session_stats import SessionStats
from target_worker.metrics import TargetMetrics
from tests.doubles.eventually import eventually
from tests.doubles.samples import by_label, total
from tests.workers.test_exactness import COMBINATIONS, stack

NUM_REQUESTS = 90


class Recording(CoordinatorMetrics):
    """Keeps the sessions that end, so that cancelled ones can be asked too."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[Session] = []

    def session_over(self, session: Session, model_name: str) -> None:
        self.ended.append(session)
        super().session_over(session, model_name)


def added(parts: list[SessionStats]) -> SessionStats:
    whole = SessionStats()
    for part in parts:
        whole.add(part)
    return whole


def check_counters(registry: CollectorRegistry, stats: SessionStats, **labels: str) -> None:
    expected = {
        "spec_decode_num_drafts_total": stats.num_steps - stats.num_free_run_steps,
        "spec_decode_num_draft_tokens_total": stats.num_drafted,
        "spec_decode_num_accepted_tokens_total": stats.num_accepted,
        "generation_tokens_total": stats.num_committed,
        "decode_steps_total": stats.num_steps,
        "free_run_steps_total": stats.num_free_run_steps,
        "draft_tokens_proposed_total": stats.num_proposed,
        "draft_tokens_dropped_total": stats.num_dropped,
        "draft_misses_total": stats.num_misses,
        "branch_catches_total": stats.num_caught,
        "lookup_tokens_total": stats.num_looked_up,
        "lookup_tokens_accepted_total": stats.num_looked_up_accepted,
        "fallbacks_total": stats.num_draft_losses,
        "target_losses_total": stats.num_target_losses,
        "spec_decode_k_sum": stats.sum_k,
        "spec_decode_k_count": stats.num_steps,
        "spec_decode_num_accepted_tokens_per_pos_total": stats.num_accepted,
    }
    assert {name: total(registry, name, **labels) for name in expected} == expected


def _is_given_up(index: int) -> bool:
    """After a few events: its answer is so long that it is not over by then."""
    return index % 3 == 0


def request(index: int, speculation: SpeculationOptions) -> GenerateRequest:
    combination = COMBINATIONS[index]
    parameters = combination.parameters
    return GenerateRequest(
        combination.prompt,
        max_tokens=64 if _is_given_up(index) else 24,
        temperature=parameters.temperature,
        seed=parameters.seed,
        ignore_eos=True,
        speculation=speculation,
        request_id=f"request-{index}",
    )


WAYS = [
    SpeculationOptions(),
    SpeculationOptions(policy="fixed", k=4),
    SpeculationOptions(policy="threshold", k=8),
    SpeculationOptions(disabled=True),
    SpeculationOptions(policy="fixed", k=3, turns=True),  # certain to have drafts on any machine
]


async def run_all(coordinator: Coordinator, ways: list[SpeculationOptions]) -> dict[str, FinishedEvent]:
    """Many at a time; every third is given up after a few events, by its reader or by its task."""
    gate, finished = asyncio.Semaphore(12), dict[str, FinishedEvent]()

    async def one(index: int) -> None:
        asked = request(index, ways[index % len(ways)])
        async with gate, aclosing(coordinator.generate(asked)) as events:
            for number in itertools.count():
                event = await anext(events, None)
                if event is None or (_is_given_up(index) and number > index % 7 and isinstance(event, TokensEvent)):
                    return
                if isinstance(event, FinishedEvent):
                    finished[asked.request_id] = event

    await asyncio.gather(*(one(index) for index in range(NUM_REQUESTS)))
    return finished


@pytest.mark.parametrize("chaos", [False, True])
async def test_counters_are_the_sums_of_the_requests_statistics(
    make_runtime, model_folders, caplog: pytest.LogCaptureFixture, chaos: bool
) -> None:
    caplog.set_level(logging.INFO, "coordinator.request_log")
    metrics = Recording()
    async with stack(make_runtime, model_folders, "close", chaos, metrics=metrics) as (coordinator, _):
        finished = await run_all(coordinator, WAYS[:-1] if chaos else WAYS)  # taking turns waits for what was lost
    registry = metrics.registry
    ended = {session.job.request_id: session for session in metrics.ended}

    assert len(ended) == NUM_REQUESTS
    assert 0.5 * NUM_REQUESTS < len(finished) < 0.7 * NUM_REQUESTS
    assert all(ended[request_id].stats == event.stats for request_id, event in finished.items())
    whole = added([session.stats for session in metrics.ended])
    assert whole.num_accepted > 0
    assert sum(session.stats.num_committed > 0 for key, session in ended.items() if key not in finished) > 10
    check_counters(registry, whole)
    for arm in Arm:
        check_counters(registry, added([s.stats for s in metrics.ended if s.arm is arm]), arm=arm.value)
    assert total(registry, "request_success_total") == len(finished)
    assert by_label(registry, "request_failure_total", "reason") == {"CANCELLED": NUM_REQUESTS - len(finished)}
    assert total(registry, "prompt_tokens_total") == sum(len(s.job.prompt_token_ids) for s in metrics.ended)
    assert total(registry, "e2e_request_latency_seconds_count") == NUM_REQUESTS
    logged = [record for record in caplog.records if record.msg == "request over"]
    assert sum(record.num_accepted for record in logged) == whole.num_accepted  # type: ignore[attr-defined]


async def test_accepted_by_position_is_the_survival_of_the_drafts(make_runtime, model_folders) -> None:
    metrics = Recording()
    async with stack(make_runtime, model_folders, "close", chaos=False, metrics=metrics) as (coordinator, _):
        asked = request(3, SpeculationOptions(policy="fixed", k=3, turns=True))
        events = [event async for event in coordinator.generate(asked)]
    steps = [event for event in events if isinstance(event, TokensEvent) and event.num_drafted]
    accepted = [sum(piece.drafted for piece in step.tokens) for step in steps]

    positions = by_label(metrics.registry, "spec_decode_num_accepted_tokens_per_pos_total", "position")

    for position in range(3):
        assert positions[str(position)] == sum(count > position for count in accepted)
    assert sum(accepted) > 0


async def test_the_targets_own_counters_agree_when_every_request_finishes(make_runtime, model_folders) -> None:
    metrics, target = Recording(), TargetMetrics()
    ways = {"chaos": False, "metrics": metrics, "target_metrics": target}
    async with stack(make_runtime, model_folders, "close", **ways) as (coordinator, _):
        for index in range(6):
            assert [event async for event in coordinator.generate(request(index, WAYS[4]))]
        await eventually(lambda: total(target.registry, "num_sessions") == 0, "the target closed them")
    steps = total(metrics.registry, "decode_steps_total")

    tokens = by_label(target.registry, "step_tokens_total", "kind")
    drafted = total(metrics.registry, "spec_decode_num_draft_tokens_total")
    assert tokens["draft"] == drafted + total(metrics.registry, "lookup_tokens_total")
    assert drafted > 0
    assert tokens["prefill"] == total(metrics.registry, "prompt_tokens_total")
    assert total(target.registry, "step_seconds_count") == steps
    assert total(target.registry, "kv_cache_usage_perc") == 0


def test_every_statistic_is_summed() -> None:
    one = SessionStats()
    for number, part in enumerate(fields(SessionStats), start=1):
        setattr(one, part.name, Counter({number: number}) if part.name.startswith("steps_by") else number)
    twice = added([one, one])

    for part in fields(SessionStats):
        value = getattr(one, part.name)
        doubled = value + value if part.name != "last_k" else value
        assert getattr(twice, part.name) == doubled, part.name
