"""The coordinator's metrics between real gRPC workers and a real client."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from coordinator.metrics import CoordinatorMetrics
from coordinator.requests import GenerateRequest
from coordinator.session import Session
from protos import generation_pb2
from rpc.errors import AddressInUse
from rpc.metrics_endpoint import metrics_endpoint
from rpc.server import Status
from tests.doubles.eventually import eventually
from tests.doubles.samples import by_label, total
from tests.doubles.scripted_workers import ScriptedDrafter, ScriptedTarget
from tests.rpc.conftest import Stack, collect, generate_request, running_stack


def registry_of(stack: Stack) -> CollectorRegistry:
    return stack.coordinator.metrics.registry


async def test_the_share_drawn_is_decoded_plainly_and_what_is_asked_for_is_not_touched() -> None:
    asked = generation_pb2.SpeculationOptions(policy="fixed", k=2)
    async with running_stack([ScriptedTarget()], [ScriptedDrafter()], plain_share=1.0) as stack:
        for speculation in (None, None, asked):
            await collect(stack.stub.Generate(generate_request(speculation=speculation)))
        drafted = by_label(registry_of(stack), "spec_decode_num_draft_tokens_total", "arm")
        tokens = by_label(registry_of(stack), "generation_tokens_total", "arm")

    assert drafted["plain"] == drafted["speculative"] == 0 < drafted["chosen"]
    assert tokens == {"speculative": 0, "plain": 80, "chosen": 40}


async def test_a_deployment_that_cannot_speculate_is_all_plain() -> None:
    async with running_stack([ScriptedTarget()]) as stack:
        await collect(stack.stub.Generate(generate_request()))
        tokens = by_label(registry_of(stack), "generation_tokens_total", "arm")

    assert tokens == {"speculative": 0, "plain": 40, "chosen": 0}


async def test_what_is_under_way_counts_before_it_is_over() -> None:
    async with running_stack([ScriptedTarget()], max_sessions=1) as stack:
        [target] = stack.targets
        target.core.hold(num_turns=3)
        requests = [asyncio.create_task(collect(stack.stub.Generate(generate_request()))) for _ in range(3)]
        await eventually(lambda: total(registry_of(stack), "generation_tokens_total") == 3, "three tokens")
        await eventually(lambda: stack.coordinator.num_waiting == 2, "the others waiting")

        assert total(registry_of(stack), "num_requests_running") == 1
        assert total(registry_of(stack), "num_requests_waiting") == 2
        assert total(registry_of(stack), "worker_sessions", role="target") == 1
        assert total(registry_of(stack), "e2e_request_latency_seconds_count") == 0
        target.core.release()
        await asyncio.gather(*requests)

        assert total(registry_of(stack), "generation_tokens_total") == 120
        assert total(registry_of(stack), "num_requests_running") == 0
        assert total(registry_of(stack), "e2e_request_latency_seconds_count") == 3
        assert total(registry_of(stack), "time_to_first_token_seconds_count") == 3
        assert total(registry_of(stack), "inter_token_latency_seconds_count") == 120 - 3
        assert total(registry_of(stack), "request_generation_tokens_sum") == 120


async def test_every_failure_has_its_reason() -> None:
    async with running_stack([ScriptedTarget()], max_sessions=1, max_queue=0) as stack:
        stack.targets[0].core.hold()
        running = asyncio.create_task(collect(stack.stub.Generate(generate_request())))
        await eventually(lambda: stack.num_worker_sessions == 1, "one running")
        for refused in (generate_request(), generate_request(max_tokens=0), generate_request(model="gpt-9")):
            with pytest.raises(grpc.aio.AioRpcError):
                await collect(stack.stub.Generate(refused))
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await eventually(lambda: stack.num_worker_sessions == 0, "the cancelled one closed")

        reasons = by_label(registry_of(stack), "request_failure_total", "reason")
        assert reasons == {"OVERLOADED": 1, "INVALID_REQUEST": 1, "MODEL_NOT_FOUND": 1, "CANCELLED": 1}
        assert total(registry_of(stack), "request_success_total") == 0


async def test_a_lost_drafter_is_seen_and_what_falls_back_is_counted() -> None:
    async with running_stack([ScriptedTarget()], [ScriptedDrafter()]) as stack:
        [target], [draft] = stack.targets, stack.drafts
        assert total(registry_of(stack), "worker_up", role="draft") == 1
        target.core.hold(num_turns=2)
        request = asyncio.create_task(collect(stack.stub.Generate(generate_request())))
        await eventually(lambda: draft.core.num_sessions == 1, "drafting")

        await draft.kill()

        await eventually(lambda: total(registry_of(stack), "worker_up", role="draft") == 0, "the loss seen")
        assert total(registry_of(stack), "fallbacks_total") == 1
        assert total(registry_of(stack), "worker_up", role="target") == 1
        target.core.release()
        await request


async def test_frames_and_bytes_of_both_kinds_of_worker() -> None:
    async with running_stack([ScriptedTarget()], [ScriptedDrafter()]) as stack:
        await collect(stack.stub.Generate(generate_request()))
        for role in ("target", "draft"):
            for direction in ("sent", "received"):
                frames = total(registry_of(stack), "frames_total", role=role, direction=direction)
                size = total(registry_of(stack), "frame_bytes_total", role=role, direction=direction)
                assert 0 < frames < 200
                assert 5 * frames < size < 500 * frames


async def test_labels_are_never_a_clients_choice() -> None:
    marker = "chosen-by-a-client"
    async with running_stack([ScriptedTarget()], [ScriptedDrafter()]) as stack:
        request = GenerateRequest(prompt=(1, 2), max_tokens=3, request_id=marker)
        assert [event async for event in stack.coordinator.generate(request)]
        for refused in (generate_request(model=marker), generate_request(temperature=-1)):
            with pytest.raises(grpc.aio.AioRpcError):
                await collect(stack.stub.Generate(refused))
        values = {
            value
            for metric in registry_of(stack).collect()
            for sample in metric.samples
            for value in sample.labels.values()
        }
    assert not any(marker in value for value in values)


async def test_a_session_that_has_just_ended_counts_once() -> None:
    seen: list[float] = []

    class Scraping(CoordinatorMetrics):
        def session_over(self, session: Session, model_name: str) -> None:
            super().session_over(session, model_name)
            seen.append(total(self.registry, "generation_tokens_total"))

    async with running_stack([ScriptedTarget()], metrics=Scraping()) as stack:
        for _ in range(2):
            await collect(stack.stub.Generate(generate_request()))
    assert seen == [40, 80]


# -- the endpoint ---------------------------------------------------------------------------------------------------


def small_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("outrider:things", "Things.", registry=registry).inc(3)
    return registry


async def test_the_endpoint_serves_the_registry_and_nothing_else() -> None:
    told: list[Status] = []
    async with (
        metrics_endpoint(small_registry(), "127.0.0.1", 0, told.append, ""),
        httpx.AsyncClient(base_url=told[0].detail.removeprefix("metrics at ").removesuffix("/metrics")) as client,
    ):
        answer, other = await client.get("/metrics"), await client.get("/else")

    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    assert ("outrider:things_total", 3.0) in [(sample.name, sample.value) for sample in samples]
    assert (other.status_code, "/metrics" in other.text) == (404, True)


async def test_the_port_is_told_and_free_again_afterwards() -> None:
    told: list[Status] = []
    async with metrics_endpoint(small_registry(), "127.0.0.1", 0, told.append, "127.0.0.1:1"):
        [status] = told
        url = status.detail.removeprefix("metrics at ")
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        with pytest.raises(AddressInUse):
            async with metrics_endpoint(small_registry(), "127.0.0.1", port, told.append, ""):
                raise AssertionError("bound twice")
    async with metrics_endpoint(small_registry(), "127.0.0.1", port, told.append, ""):
        pass


async def test_without_a_port_there_is_no_endpoint() -> None:
    told: list[Status] = []
    async with metrics_endpoint(small_registry(), "127.0.0.1", None, told.append, ""):
        assert told == []
