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
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

import grpc

from protos import generation_pb2 as pb
from protos import generation_pb2_grpc
from rpc.channel import open_channel
from rpc.errors import FieldViolation, InvalidRequest, Unavailable, from_rpc_error


@dataclass(frozen=True, slots=True)
class Speculation:
    """How to speculate; never changes the output. None and empty leave the choice to the deployment."""

    disabled: bool = False
    policy: str = ""
    """"fixed", "threshold" or "goodput"."""
    k: int | None = None
    """K for "fixed", the greatest K otherwise."""
    lookahead: int | None = None
    """Draft at most this many tokens beyond the committed ones."""


@dataclass(frozen=True, slots=True)
class Started:
    """The request is admitted; ``seed`` is the one in use."""

    request_id: str
    model: str
    prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Token:
    """One committed token; ``text`` is the part of the output that it completed."""

    id: int
    text: str
    drafted: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one verify step committed."""

    text: str
    tokens: tuple[Token, ...]
    num_drafted: int
    k: int


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Counts over one request; see ``SpeculationStats`` in ``generation.proto``."""

    num_steps: int
    num_free_run_steps: int
    num_drafted: int
    num_accepted: int
    num_proposed: int
    num_dropped: int
    acceptance_rate: float
    mean_acceptance_length: float
    mean_k: float
    last_k: int
    num_draft_losses: int
    num_target_losses: int
    policy: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds at the coordinator, from the request's arrival."""

    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. ``finish_reason`` is "stop" or "length"."""

    finish_reason: str
    usage: Usage
    speculation: SpeculationStats
    timing: Timing


Event: TypeAlias = Started | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. ``drafted[i]`` tells whether ``token_ids[i]`` came from the drafter."""

    text: str
    token_ids: tuple[int, ...]
    drafted: tuple[bool, ...]
    finish_reason: str
    seed: int
    usage: Usage
    speculation: SpeculationStats
    timing: Timing


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the deployment serves now."""

    name: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    draft_models: tuple[str, ...]
    num_targets: int
    num_drafters: int
    policy: str
    max_k: int


class Client:
    """One channel to a coordinator, for any number of requests at a time."""

    def __init__(self, address: str) -> None:
        self._address = address

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
        with self._errors():
            return _served_model(await self._stub.GetModel(pb.GetServedModelRequest()))

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
        speculation: Speculation = Speculation(),
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """`Started`, then `Tokens` many times, then `Finished`.

        ``prompt`` is text or token ids; None leaves a parameter to the server. Raises `InvalidRequest` naming the
        field, and the rest of `rpc.errors`.
        """
        _check_fits(max_tokens=max_tokens, top_k=top_k, k=speculation.k, lookahead=speculation.lookahead, seed=seed)
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
                **({"text": prompt} if isinstance(prompt, str) else {"tokens": pb.TokenIds(ids=prompt)}),
            )
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            with self._errors():
                async for event in call:
                    yield _event(event)
        finally:
            call.cancel()

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
        speculation: Speculation = Speculation(),
        timeout_s: float | None = None,
    ) -> Completion:
        """The whole answer of `generate`, with the same parameters and errors."""
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
            timeout_s=timeout_s,
        )
        async with aclosing(events):
            return collect([event async for event in events])

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            known = from_rpc_error(error)
            if type(known) is Unavailable and not _from_server(error):
                raise Unavailable(
                    f"no coordinator answers at {self._address}: start one (`outrider up`) or give its address"
                ) from error
            raise known from error


def collect(events: Sequence[Event]) -> Completion:
    """One answer from all of its events. Raises `Unavailable` if the last is missing."""
    seed = next((event.seed for event in events if isinstance(event, Started)), 0)
    steps = [event for event in events if isinstance(event, Tokens)]
    tokens = [token for step in steps for token in step.tokens]
    finished = events[-1] if events else None
    if not isinstance(finished, Finished):
        raise Unavailable("the stream ended before the answer did: ask again")
    return Completion(
        text="".join(step.text for step in steps),
        token_ids=tuple(token.id for token in tokens),
        drafted=tuple(token.drafted for token in tokens),
        finish_reason=finished.finish_reason,
        seed=seed,
        usage=finished.usage,
        speculation=finished.speculation,
        timing=finished.timing,
    )


def _check_fits(**values: int | None) -> None:
    """Raises `InvalidRequest` for an integer that its wire type cannot hold; the server checks everything else."""
    for name, value in values.items():
        start, stop = (0, 2**64) if name == "seed" else (-(2**63), 2**63)
        if value is not None and not start <= value < stop:
            path = f"speculation.{name}" if name in {"k", "lookahead"} else name
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
    )


def _event(event: pb.GenerateEvent) -> Event:
    match event.WhichOneof("event"):
        case "started":
            started = event.started
            return Started(started.request_id, started.model, started.prompt_tokens, started.seed)
        case "tokens":
            return _tokens(event.tokens)
        case "finished":
            return _finished(event.finished)
        case unknown:
            raise Unavailable(f"the server sent an event that this client does not know ({unknown}): update the client")


def _tokens(tokens: pb.Tokens) -> Tokens:
    items = tuple(Token(token.id, token.text, token.drafted) for token in tokens.tokens)
    return Tokens(tokens.text, items, tokens.num_drafted, tokens.k)


def _finished(finished: pb.Finished) -> Finished:
    usage, stats, timing = finished.usage, finished.speculation, finished.timing
    return Finished(
        finish_reason=finished.finish_reason,
        usage=Usage(usage.prompt_tokens, usage.completion_tokens),
        speculation=SpeculationStats(
            num_steps=stats.num_steps,
            num_free_run_steps=stats.num_free_run_steps,
            num_drafted=stats.num_drafted,
            num_accepted=stats.num_accepted,
            num_proposed=stats.num_proposed,
            num_dropped=stats.num_dropped,
            acceptance_rate=stats.acceptance_rate,
            mean_acceptance_length=stats.mean_acceptance_length,
            mean_k=stats.mean_k,
            last_k=stats.last_k,
            num_draft_losses=stats.num_draft_losses,
            num_target_losses=stats.num_target_losses,
            policy=stats.policy,
        ),
        timing=Timing(timing.queue_s, timing.first_token_s, timing.total_s),
    )


def _served_model(model: pb.ServedModel) -> ServedModel:
    return ServedModel(
        name=model.name,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        eos_token_ids=tuple(model.eos_token_ids),
        draft_models=tuple(model.draft_models),
        num_targets=model.num_targets,
        num_drafters=model.num_drafters,
        policy=model.policy,
        max_k=model.max_k,
    )
