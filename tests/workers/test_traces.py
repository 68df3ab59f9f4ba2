"""One request is one trace, from the client to both workers, over real streams that many requests share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from outrider.client import Client, Speculation, Tokens
from protos import generation_pb2, generation_pb2_grpc
from rpc.channel import open_channel
from rpc.errors import InvalidRequest
from telemetry.otel import OtelTracing
from telemetry.tracing import METADATA_KEY, NO_TRACING, Tracing
from tests.doubles.eventually import eventually
from tests.workers.deployment import deployment

SPECULATING = Speculation(policy="fixed", k=3, turns=True)  # certain to have drafts on any machine
PROMPT = (5, 6, 7, 8)
SENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Recorder:
    """Traces of all roles in one place."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self._made: list[Tracing] = []

    def tracing(self, role: str) -> Tracing:
        provider = TracerProvider(resource=Resource({SERVICE_NAME: role}), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self._made.append(OtelTracing(provider, role))
        return self._made[-1]

    def close(self) -> None:
        for tracing in self._made:
            tracing.close()

    @property
    def spans(self) -> dict[str, list[ReadableSpan]]:
        """By role and name, those that have ended."""
        found: dict[str, list[ReadableSpan]] = {}
        for span in self.exporter.get_finished_spans():
            found.setdefault(f"{span.resource.attributes[SERVICE_NAME]} {span.name}", []).append(span)
        return found

    async def ended(self, num_spans: int) -> dict[str, list[ReadableSpan]]:
        await eventually(lambda: len(self.exporter.get_finished_spans()) == num_spans, f"{num_spans} spans")
        return self.spans


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.close()


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


async def test_a_request_is_one_tree(make_runtime, model_folders, recorder: Recorder) -> None:
    async with deployment(make_runtime, model_folders, recorder.tracing) as running:
        async with Client(running.address, recorder.tracing("client")) as client:
            answer = await client.complete(PROMPT, max_tokens=16, speculation=SPECULATING)
        spans = await recorder.ended(4)

    [request], [generate] = spans["client request"], spans["coordinator generate"]
    [verify], [draft] = spans["target-worker verify"], spans["draft-worker draft"]
    assert len({span.context.trace_id for span in (request, generate, verify, draft)}) == 1
    assert parent_of(request) is None
    assert parent_of(generate) == request.context.span_id
    assert parent_of(verify) == parent_of(draft) == generate.context.span_id
    told = generate.attributes
    assert told is not None
    assert (told["num_tokens"], told["outcome"], told["arm"]) == (16, answer.finish_reason, "chosen")
    assert told["num_accepted"] == answer.speculation.num_accepted > 0
    for span in (generate, verify):
        assert [event.name for event in span.events] == ["verdict"] * answer.speculation.num_steps
        assert sum(event.attributes["num_tokens"] for event in span.events) == 16  # type: ignore[misc, index]


async def test_requests_at_the_same_time_are_not_mixed_up(make_runtime, model_folders, recorder: Recorder) -> None:
    num_requests = 8
    async with deployment(make_runtime, model_folders, recorder.tracing) as running:
        async with Client(running.address, recorder.tracing("client")) as client:
            requests = [client.complete((5, n), max_tokens=8, speculation=SPECULATING) for n in range(num_requests)]
            await asyncio.gather(*requests)
        spans = await recorder.ended(4 * num_requests)

    children = {parent_of(span): span for span in spans["coordinator generate"]}
    assert set(children) == {span.context.span_id for span in spans["client request"]}
    generates = {span.context.span_id for span in spans["coordinator generate"]}
    assert {parent_of(span) for span in spans["target-worker verify"]} == generates
    assert {parent_of(span) for span in spans["draft-worker draft"]} == generates


async def test_a_cancelled_request_ends_its_spans_and_says_so(make_runtime, model_folders, recorder: Recorder) -> None:
    async with deployment(make_runtime, model_folders, recorder.tracing) as running:
        async with Client(running.address, recorder.tracing("client")) as client:
            events = client.generate(PROMPT, max_tokens=200, ignore_eos=True, speculation=SPECULATING)
            async for event in events:
                if isinstance(event, Tokens):
                    break
            await events.aclose()
        spans = await recorder.ended(4)

    [generate] = spans["coordinator generate"]
    assert (generate.status.status_code, generate.status.description) == (StatusCode.ERROR, "CANCELLED")


async def test_a_refused_request_is_a_failed_span(make_runtime, model_folders, recorder: Recorder) -> None:
    async with deployment(make_runtime, model_folders, recorder.tracing) as running:
        async with Client(running.address, recorder.tracing("client")) as client:
            with pytest.raises(InvalidRequest):
                await client.complete(PROMPT, max_tokens=0)
        spans = await recorder.ended(2)

    for [span] in spans.values():
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "INVALID_REQUEST")


async def test_a_coordinator_without_traces_does_not_cut_them(make_runtime, model_folders, recorder: Recorder) -> None:
    def tracing_of(role: str) -> Tracing:
        return NO_TRACING if role == "coordinator" else recorder.tracing(role)

    async with deployment(make_runtime, model_folders, tracing_of) as running:
        async with Client(running.address, recorder.tracing("client")) as client:
            await client.complete(PROMPT, max_tokens=8, speculation=SPECULATING)
        spans = await recorder.ended(3)

    [request] = spans["client request"]
    assert parent_of(spans["target-worker verify"][0]) == request.context.span_id


async def test_any_client_may_send_a_traceparent_on_either_kind_of_call(
    make_runtime, model_folders, recorder: Recorder
) -> None:
    request = generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=PROMPT), max_tokens=3)
    metadata = ((METADATA_KEY, SENT),)
    async with deployment(make_runtime, model_folders, recorder.tracing) as running:
        async with open_channel(running.address) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            assert [event async for event in stub.Generate(request, metadata=metadata)]
            many = generation_pb2.GenerateManyRequest(tag="a", generate=request)
            assert [event async for event in stub.GenerateMany(iter([many]), metadata=metadata)]
            assert [event async for event in stub.Generate(request, metadata=((METADATA_KEY, "nonsense"),))]
        await eventually(lambda: len(recorder.spans.get("coordinator generate", [])) == 3, "three requests")

    traces = [span.context.trace_id for span in recorder.spans["coordinator generate"]]
    assert traces[:2] == [int(SENT.split("-")[1], 16)] * 2
    assert traces[2] != traces[0]
