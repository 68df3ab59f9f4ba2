"""A small asynchronous client of the coordinator's gRPC front door.

>>> async with Client("127.0.0.1:50051") as client:
...     async for event in client.generate("def fib(n):", max_tokens=64):
...         ...

Errors are those of `rpc.errors`. Leaving the iteration (cancel the task, or ``aclose()``) cancels the call, and the
work stops on every worker within one step.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Unpack

import grpc

from outrider.events import (
    Completion,
    Event,
    Finished,
    ServedModel,
    Speculation,
    SpeculationStats,
    Started,
    StructuredOutput,
    Timing,
    Token,
    TokenLogprobs,
    Tokens,
    Usage,
    collect,
    event_from_proto,
    served_model_from_proto,
)
from outrider.sampling_options import SamplingOptions, set_options
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc
from rpc.channel import open_channel
from rpc.errors import FieldViolation, InvalidRequest, OutriderError, Unavailable, from_rpc_error
from telemetry.tracing import METADATA_KEY, NO_TRACING, Tracing

__all__ = [
    "Client",
    "Completion",
    "Event",
    "Finished",
    "SamplingOptions",
    "ServedModel",
    "Speculation",
    "SpeculationStats",
    "Started",
    "StructuredOutput",
    "Timing",
    "Token",
    "TokenLogprobs",
    "Tokens",
    "Usage",
    "collect",
]

AS_DEPLOYED = Speculation()


class Client:
    """One channel to a coordinator, for any number of requests at a time."""

    def __init__(self, address: str, tracing: Tracing = NO_TRACING) -> None:
        """With ``tracing`` every request is a span, whose trace goes on at the server."""
        self._address = address
        self._tracing = tracing

    async def __aenter__(self) -> Client:
        self._channel = open_channel(self._address)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def model(self) -> ServedModel:
        """What is served. Raises `Unavailable` if nobody answers."""
        try:
            return served_model_from_proto(await self._stub.GetModel(pb.GetServedModelRequest()))
        except grpc.aio.AioRpcError as error:
            raise self._known(error) from error

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        speculation: Speculation = AS_DEPLOYED,
        structured_output: StructuredOutput | None = None,
        timeout_s: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncGenerator[Event, None]:
        """`Started`, then `Tokens` many times, then `Finished`; the last two of each choice, if ``n`` asks for several.

        ``prompt`` is text or token ids; None leaves a parameter to the server; ``options`` are `SamplingOptions`.
        Raises `InvalidRequest` naming the field, and the rest of `rpc.errors`.
        """
        if not isinstance(speculation, Speculation):
            raise TypeError(f"speculation has to be like Speculation(disabled=True), not {speculation!r}")
        _check_fits(max_tokens=max_tokens, top_k=top_k, seed=seed)
        _check_fits(k=speculation.k, lookahead=speculation.lookahead, draft_top_n=speculation.draft_top_n)
        with _representable():
            request = pb.GenerateRequest(
                model=model,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop_token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
                speculation=_speculation_options(speculation),
                structured_output=None if structured_output is None else _structured_output(structured_output),
                **({"text": prompt} if isinstance(prompt, str) else {"tokens": pb.TokenIds(ids=prompt)}),
            )
            set_options(request, **options)
        span = self._tracing.start("request")
        metadata = ((METADATA_KEY, span.context),) if span.context else None
        call = self._stub.Generate(request, timeout=timeout_s, metadata=metadata)
        answered = False
        try:
            async for event in call:
                answered = True
                yield event_from_proto(event)
        except grpc.aio.AioRpcError as error:
            known = self._known(error, answered)
            span.end(known.reason)
            raise known from error
        finally:
            call.cancel()
            span.end()

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        speculation: Speculation = AS_DEPLOYED,
        structured_output: StructuredOutput | None = None,
        timeout_s: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """The whole answer of `generate` (its first choice), with the same parameters and errors."""
        events = self.generate(
            prompt,
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            speculation=speculation,
            structured_output=structured_output,
            timeout_s=timeout_s,
            **options,
        )
        async with aclosing(events):
            return collect([event async for event in events])

    def _known(self, error: grpc.aio.AioRpcError, answered: bool = False) -> OutriderError:
        """What the server meant, or what became of it; ``answered``: part of the answer is here already."""
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return Unavailable(f"what answers at {self._address} is no coordinator; is it a worker's address?")
        known = from_rpc_error(error)
        if type(known) is not Unavailable or _from_server(error):
            return known
        if answered:
            return Unavailable(f"lost the coordinator at {self._address}: the answer is incomplete")
        return Unavailable(f"no coordinator answers at {self._address}: start one (`outrider up`) or give its address")


def _check_fits(**values: int | None) -> None:
    """Raises `InvalidRequest` for an integer that its wire type cannot hold; the server checks everything else."""
    for name, value in values.items():
        start, stop = (0, 2**64) if name == "seed" else (-(2**63), 2**63)
        if value is not None and not start <= value < stop:
            path = f"speculation.{name}" if name in {"k", "lookahead", "draft_top_n"} else name
            raise InvalidRequest(FieldViolation(path, f"has to be in [{start}, {stop}), got {value}"))


@contextmanager
def _representable() -> Iterator[None]:
    """A prompt that protobuf cannot hold (text with lone surrogates) is the caller's mistake, not a crash."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InvalidRequest(FieldViolation("request", f"cannot be sent: {error}")) from None


def _from_server(error: grpc.aio.AioRpcError) -> bool:
    """Whether our server said so; gRPC's own client reports a failed connection with no trailing metadata."""
    return bool(error.trailing_metadata())


def _speculation_options(speculation: Speculation) -> pb.SpeculationOptions:
    return pb.SpeculationOptions(
        disabled=speculation.disabled,
        policy=speculation.policy,
        k=speculation.k,
        lookahead=speculation.lookahead,
        turns=speculation.turns,
        method=speculation.method,
        draft_top_n=speculation.draft_top_n,
    )


def _structured_output(wanted: StructuredOutput) -> pb.StructuredOutput:
    texts = (wanted.json_schema, wanted.regex, wanted.grammar)
    if wanted.json_object + sum(text is not None for text in texts) > 1:
        raise InvalidRequest(FieldViolation("structured_output", "says more than one thing; give one of its fields"))
    if wanted.json_schema is not None:
        return pb.StructuredOutput(json_schema=wanted.json_schema)
    if wanted.regex is not None:
        return pb.StructuredOutput(regex=wanted.regex)
    if wanted.grammar is not None:
        return pb.StructuredOutput(grammar=wanted.grammar)
    return pb.StructuredOutput(json_object=wanted.json_object)
