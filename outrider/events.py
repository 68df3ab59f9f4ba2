"""What a client asks for and gets, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from protos import generation_pb2 as pb
from rpc.errors import Unavailable


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the answer has to look like: exactly one of these."""

    json_schema: str | None = None
    """A JSON schema, as JSON."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """A regular expression, for the whole answer."""
    grammar: str | None = None
    """EBNF, as GBNF or Lark."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """How to speculate. None and empty leave the choice to the deployment."""

    disabled: bool = False
    policy: str = ""
    """"fixed", "threshold" or "goodput"."""
    k: int | None = None
    """K for "fixed", the greatest K otherwise."""
    lookahead: int | None = None
    """Draft at most this many tokens beyond the committed ones."""
    turns: bool = False
    """For measurements: draft, then verify, in turns."""
    method: str = ""
    """"coupled", the default, never changes a token; "rejection" and "block" never change the distribution."""
    draft_top_n: int | None = None
    """For these two: how many of its most likely tokens the drafter draws from."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of the token at one place, and ``(id, logprob)`` of the most likely ones there, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The request is admitted; ``seed`` is the one in use."""

    request_id: str
    model: str
    prompt_tokens: int
    seed: int
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """If asked for: of the prompt's tokens from the second on."""


@dataclass(frozen=True, slots=True)
class Token:
    """One committed token; ``text`` is the part of the output that it completed."""

    id: int
    text: str
    drafted: bool
    logprobs: TokenLogprobs | None = None
    """If asked for."""
    looked_up: bool = False
    """The target had found it in the sequence before it drew it."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one verify step committed."""

    text: str
    tokens: tuple[Token, ...]
    num_drafted: int
    k: int
    choice: int = 0
    """Which of the request's ``n`` answers."""
    num_looked_up: int = 0
    """Tokens that the step verified behind the drafted ones, looked up in the sequence itself."""


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
    num_misses: int = 0
    """Steps that contradicted what was drafted."""
    num_caught: int = 0
    """Of these, steps after which a branch went on from the target's own token."""
    q_bytes_received: int = 0
    """Bytes of draft distributions that came from draft workers."""
    q_bytes_relayed: int = 0
    """Of these, bytes that went on to the target."""
    steps_by_accepted: tuple[tuple[int, int], ...] = ()
    """``(accepted, steps)``: steps with drafted tokens, by how many of those were accepted."""
    num_wasted: int = 0
    """Drafted tokens that draft workers sent and that were not accepted."""
    estimated_speedup: float = 0.0
    """Over plain decoding; 0 if unknown, or decoded plainly."""
    num_looked_up: int = 0
    """Tokens that targets had looked up in the sequence itself and verified behind the drafted ones."""
    num_looked_up_accepted: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds at the coordinator, from the request's arrival."""

    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a choice. ``finish_reason`` is "stop" or "length"."""

    finish_reason: str
    usage: Usage
    speculation: SpeculationStats
    timing: Timing
    choice: int = 0
    stop_reason: str | int | None = None
    """The stop string, or the one of the request's own stop tokens, that ended it."""


Event: TypeAlias = Started | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. ``drafted[i]`` tells whether ``token_ids[i]`` came from the drafter, ``looked_up[i]`` whether the
    target had found it in the sequence itself."""

    text: str
    token_ids: tuple[int, ...]
    drafted: tuple[bool, ...]
    finish_reason: str
    seed: int
    usage: Usage
    speculation: SpeculationStats
    timing: Timing
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """As many as ``token_ids``, if asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    looked_up: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Traffic:
    """Frames between the coordinator and its workers since it started."""

    num_target_steps: int = 0
    num_frames_to_targets: int = 0
    num_frames_from_targets: int = 0
    num_frames_to_drafters: int = 0
    num_frames_from_drafters: int = 0


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
    traffic: Traffic = Traffic()


def collect(events: Sequence[Event], choice: int = 0) -> Completion:
    """One answer from all events of its request. Raises `Unavailable` if the last is missing."""
    started = next((event for event in events if isinstance(event, Started)), None)
    steps = [event for event in events if isinstance(event, Tokens) and event.choice == choice]
    tokens = [token for step in steps for token in step.tokens]
    finished = next((event for event in events if isinstance(event, Finished) and event.choice == choice), None)
    if finished is None:
        raise Unavailable("the stream ended before the answer did: ask again")
    return Completion(
        text="".join(step.text for step in steps),
        token_ids=tuple(token.id for token in tokens),
        drafted=tuple(token.drafted for token in tokens),
        looked_up=tuple(token.looked_up for token in tokens),
        finish_reason=finished.finish_reason,
        seed=0 if started is None else started.seed,
        usage=finished.usage,
        speculation=finished.speculation,
        timing=finished.timing,
        stop_reason=finished.stop_reason,
        logprobs=tuple(token.logprobs for token in tokens if token.logprobs is not None),
        prompt_logprobs=() if started is None else started.prompt_logprobs,
    )


def event_from_proto(event: pb.GenerateEvent) -> Event:
    """Raises `rpc.errors.Unavailable` for an event of a newer protocol."""
    match event.WhichOneof("event"):
        case "started":
            return _started(event.started)
        case "tokens":
            return _tokens(event.tokens, event.choice)
        case "finished":
            return _finished(event.finished, event.choice)
        case unknown:
            raise Unavailable(f"the server sent an event that this client does not know ({unknown}): update the client")


def _started(started: pb.Started) -> Started:
    prompt_logprobs = tuple(
        TokenLogprobs(item.logprob, tuple(zip(item.top_token_ids, item.top_logprobs, strict=False)))
        for item in started.prompt_logprobs
    )
    return Started(started.request_id, started.model, started.prompt_tokens, started.seed, prompt_logprobs)


def _tokens(tokens: pb.Tokens, choice: int) -> Tokens:
    items = tuple(
        Token(token.id, token.text, token.drafted, _logprobs(token), token.looked_up) for token in tokens.tokens
    )
    return Tokens(tokens.text, items, tokens.num_drafted, tokens.k, choice, tokens.num_looked_up)


def _logprobs(token: pb.Token) -> TokenLogprobs | None:
    if not token.HasField("logprob"):
        return None
    return TokenLogprobs(token.logprob, tuple((item.token_id, item.logprob) for item in token.top_logprobs))


def _stop_reason(reason: pb.StopReason) -> str | int | None:
    match reason.WhichOneof("reason"):
        case "text":
            return reason.text
        case "token_id":
            return reason.token_id
        case _:
            return None


def _finished(finished: pb.Finished, choice: int) -> Finished:
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
            num_misses=stats.num_misses,
            num_caught=stats.num_caught,
            q_bytes_received=stats.q_bytes_received,
            q_bytes_relayed=stats.q_bytes_relayed,
            steps_by_accepted=tuple(sorted(stats.steps_by_accepted.items())),
            num_wasted=stats.num_wasted,
            estimated_speedup=stats.estimated_speedup,
            num_looked_up=stats.num_looked_up,
            num_looked_up_accepted=stats.num_looked_up_accepted,
        ),
        timing=Timing(timing.queue_s, timing.first_token_s, timing.total_s),
        choice=choice,
        stop_reason=_stop_reason(finished.stop_reason),
    )


def served_model_from_proto(model: pb.ServedModel) -> ServedModel:
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
        traffic=Traffic(
            num_target_steps=model.traffic.num_target_steps,
            num_frames_to_targets=model.traffic.num_frames_to_targets,
            num_frames_from_targets=model.traffic.num_frames_from_targets,
            num_frames_to_drafters=model.traffic.num_frames_to_drafters,
            num_frames_from_drafters=model.traffic.num_frames_from_drafters,
        ),
    )
