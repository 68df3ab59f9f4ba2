"""The client against a scripted server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from outrider.client import (
    Client,
    Completion,
    Finished,
    Speculation,
    Started,
    Token,
    TokenLogprobs,
    Tokens,
    collect,
)
from outrider.events import event_from_proto
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc
from rpc.errors import FieldViolation, InvalidRequest, Overloaded, Unavailable, abort_with


class ScriptedServer(generation_pb2_grpc.GenerationServicer):
    """Answers by prompt: "ok", "bad", "busy", "cut" or "endless"."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.endless = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def GetModel(self, request: pb.GetServedModelRequest, context: object) -> pb.ServedModel:
        return pb.ServedModel(name="m", vocab_size=9, eos_token_ids=[0], draft_models=["d"], num_targets=1, max_k=8)

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateEvent]
    ) -> AsyncIterator[pb.GenerateEvent]:
        self.requests.append(request)
        if request.text == "bad":
            await abort_with(context, InvalidRequest(FieldViolation("top_p", "has to be in (0, 1]")))
        if request.text == "busy":
            await abort_with(context, Overloaded("try again", retry_after_s=2.5))
        yield pb.GenerateEvent(started=pb.Started(request_id="r", model="m", prompt_tokens=2, seed=2**64 - 1))
        yield pb.GenerateEvent(tokens=_step("ab", (1, "a", True), (2, "b", False)))
        if request.text == "endless":
            self.endless.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if request.text == "cut":
            return
        yield pb.GenerateEvent(tokens=_step("c", (3, "c", False)))
        yield pb.GenerateEvent(
            finished=pb.Finished(
                finish_reason="length",
                usage=pb.Usage(prompt_tokens=2, completion_tokens=3),
                speculation=pb.SpeculationStats(num_steps=2, num_drafted=1, num_accepted=1, acceptance_rate=1.0),
                timing=pb.Timing(total_s=0.5),
            )
        )


def _step(text: str, *tokens: tuple[int, str, bool]) -> pb.Tokens:
    return pb.Tokens(text=text, tokens=[pb.Token(id=i, text=t, drafted=d) for i, t, d in tokens], num_drafted=1, k=4)


@pytest.fixture
async def server() -> AsyncIterator[tuple[ScriptedServer, str]]:
    scripted = ScriptedServer()
    grpc_server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServicer_to_server(scripted, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    yield scripted, f"127.0.0.1:{port}"
    await grpc_server.stop(0)


async def test_events_are_plain_data(server: tuple[ScriptedServer, str]) -> None:
    async with Client(server[1]) as client:
        events = [event async for event in client.generate("ok")]

    assert events[0] == Started("r", "m", 2, 2**64 - 1)
    assert events[1] == Tokens("ab", (Token(1, "a", True), Token(2, "b", False)), 1, 4)
    assert isinstance(events[3], Finished)


async def test_a_whole_answer(server: tuple[ScriptedServer, str]) -> None:
    async with Client(server[1]) as client:
        answer = await client.complete("ok")

    assert isinstance(answer, Completion)
    assert (answer.text, answer.token_ids, answer.drafted) == ("abc", (1, 2, 3), (True, False, False))
    assert (answer.finish_reason, answer.seed, answer.usage.completion_tokens) == ("length", 2**64 - 1, 3)


async def test_what_is_unset_stays_unset(server: tuple[ScriptedServer, str]) -> None:
    async with Client(server[1]) as client:
        await client.complete("ok")
        await client.complete([1, 2], temperature=0.0, seed=0, max_tokens=3, speculation=Speculation(k=0))

    first, second = server[0].requests
    assert not any(first.HasField(name) for name in ("temperature", "seed", "max_tokens", "top_k", "top_p"))  # type: ignore[arg-type]
    assert not first.speculation.HasField("k")
    assert (second.HasField("temperature"), second.HasField("seed"), second.speculation.HasField("k")) == (True,) * 3
    assert list(second.tokens.ids) == [1, 2]


async def test_errors_come_back_as_what_they_were(server: tuple[ScriptedServer, str]) -> None:
    async with Client(server[1]) as client:
        with pytest.raises(InvalidRequest) as bad:
            await client.complete("bad")
        with pytest.raises(Overloaded) as busy:
            await client.complete("busy")

    assert bad.value.violations == (FieldViolation("top_p", "has to be in (0, 1]"),)
    assert busy.value.retry_after_s == 2.5


async def test_a_stream_that_ends_early_is_no_answer(server: tuple[ScriptedServer, str]) -> None:
    async with Client(server[1]) as client:
        with pytest.raises(Unavailable, match="ask again"):
            await client.complete("cut")


async def test_a_value_that_does_not_fit_is_refused_here(server: tuple[ScriptedServer, str]) -> None:
    async with Client(server[1]) as client:
        with pytest.raises(InvalidRequest, match=r"seed: .*got 18446744073709551616"):
            await client.complete("ok", seed=2**64)
        with pytest.raises(InvalidRequest, match=r"speculation\.k"):
            await client.complete("ok", speculation=Speculation(k=2**63))
        with pytest.raises(InvalidRequest, match="surrogates"):
            await client.complete("\udcff")


async def test_nobody_there_is_said_with_the_address() -> None:
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: .*outrider up"):
            await client.model()


async def test_closing_the_iterator_cancels_the_call(server: tuple[ScriptedServer, str]) -> None:
    async with Client(server[1]) as client:
        events = client.generate("endless")
        await anext(events)
        await asyncio.wait_for(server[0].endless.wait(), 5)
        await events.aclose()

        await asyncio.wait_for(server[0].cancelled.wait(), 5)


async def test_cancelling_the_task_cancels_the_call(server: tuple[ScriptedServer, str]) -> None:
    async with Client(server[1]) as client:
        task = asyncio.create_task(client.complete("endless"))
        await asyncio.wait_for(server[0].endless.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await asyncio.wait_for(server[0].cancelled.wait(), 5)


async def test_the_served_model(server: tuple[ScriptedServer, str]) -> None:
    async with Client(server[1]) as client:
        model = await client.model()

    assert (model.name, model.eos_token_ids, model.draft_models, model.max_k) == ("m", (0,), ("d",), 8)


async def test_options_reach_the_server(server: tuple[ScriptedServer, str]) -> None:
    scripted, address = server
    async with Client(address) as client:
        await client.complete(
            "ok",
            min_p=0.1,
            repetition_penalty=None,
            logit_bias={3: -1.5},
            bad_words=["x", "y"],
            min_tokens=2,
            n=1,
            logprobs=0,
            logprobs_mode="processed",
            stop="one",
            include_stop_str_in_output=True,
        )
    request = scripted.requests[-1]
    assert (request.min_p, request.HasField("repetition_penalty")) == (0.1, False)
    assert [(item.token_id, item.bias) for item in request.logit_bias] == [(3, -1.5)]
    assert (list(request.bad_words), list(request.stop)) == (["x", "y"], ["one"])
    assert (request.min_tokens, request.n, request.HasField("logprobs"), request.logprobs) == (2, 1, True, 0)
    assert (request.logprobs_mode, request.include_stop_str_in_output) == ("processed", True)


@pytest.mark.parametrize("options", [{"n": 2**63}, {"logit_bias": {-1: 1.0}}, {"logprobs": -(2**70)}])
async def test_options_that_do_not_fit_the_wire(options: dict[str, Any]) -> None:
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match=next(iter(options))):
            await client.complete("ok", **options)


def test_one_of_several_choices() -> None:
    stats = pb.GenerateEvent(finished=pb.Finished(finish_reason="stop"), choice=0)
    logprob = pb.Token(id=5, text="b", logprob=-1.5, top_logprobs=[pb.TopLogprob(token_id=5, logprob=-1.5)])
    last = pb.Finished(finish_reason="stop", stop_reason=pb.StopReason(text="x"))
    events = [
        pb.GenerateEvent(started=pb.Started(seed=7)),
        pb.GenerateEvent(tokens=pb.Tokens(text="b", tokens=[logprob]), choice=1),
        pb.GenerateEvent(tokens=_step("a", (1, "a", True)), choice=0),
        stats,
        pb.GenerateEvent(finished=last, choice=1),
    ]
    answers = [collect([event_from_proto(event) for event in events], choice) for choice in (0, 1)]
    assert [(answer.text, answer.stop_reason, answer.seed) for answer in answers] == [("a", None, 7), ("b", "x", 7)]
    assert [answer.logprobs for answer in answers] == [(), (TokenLogprobs(-1.5, ((5, -1.5),)),)]
