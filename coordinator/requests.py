"""What clients ask for, and what of it can be done.

`GenerateRequest` is a request as the client said it, whatever door it came through; `validate` turns it into a `Job`
with every default filled in, or names everything that is wrong with it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coordinator.vocabulary import ServedModel
from rpc.errors import FieldViolation, InvalidRequest, ModelNotFound
from speculation.adaptive_k import POLICY_NAMES
from speculation.draft_distribution import MAX_DRAFT_TOP_N
from speculation.messages import Method, ModelInfo, Sampling, TokenId
from speculation.relay import lookahead_for

MAX_STOP_TOKENS = 64
MAX_K = 64
MAX_LOOKAHEAD = 256
MAX_NAMED_TOKENS = 3
MAX_SHOWN_CHARS = 60

METHOD_NAMES = tuple(method.value for method in Method if method is not Method.UNKNOWN)

DEFAULT_DRAFT_TOP_N = 64
"""Tokens of q that are sent; docs/exactness.md says what more or fewer change."""


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """How to speculate, None or empty where the deployment is to choose."""

    disabled: bool = False
    policy: str = ""
    k: int | None = None
    lookahead: int | None = None
    turns: bool = False
    method: str = ""
    """"coupled" if empty; the others keep the distribution of the output, not its tokens (docs/exactness.md)."""
    draft_top_n: int | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request as said by the client; None where it said nothing. Fields as in ``generation.proto``."""

    prompt: str | Sequence[TokenId]
    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_token_ids: Sequence[TokenId] = ()
    ignore_eos: bool = False
    speculation: SpeculationOptions = SpeculationOptions()
    request_id: str = ""
    """Empty: one is made up."""


@dataclass(frozen=True, slots=True)
class SpeculationDefaults:
    """The deployment's choice where a request has none."""

    policy: str
    max_k: int
    max_lookahead: int


@dataclass(frozen=True, slots=True)
class Job:
    """A valid request, nothing left open."""

    request_id: str
    prompt_token_ids: tuple[TokenId, ...]
    sampling: Sampling
    max_length: int
    """Prompt and output together."""
    stop_token_ids: tuple[TokenId, ...]
    policy: str | None
    """None is plain decoding."""
    k: int
    max_lookahead: int
    turns: bool = False


def validate(request: GenerateRequest, model: ServedModel, defaults: SpeculationDefaults) -> Job:
    """Fills in the defaults. Tokenizes the prompt, so it takes about a millisecond per 10,000 characters.

    Raises `ModelNotFound`, and `InvalidRequest` with every bad field, its value and the limit.
    """
    info = model.info
    if request.model not in ("", info.name):
        raise ModelNotFound(f"model {_shown(request.model)} is not served here; use {info.name!r} or leave it empty")
    try:
        prompt = _prompt_token_ids(request.prompt, model)
    except UnicodeEncodeError as error:
        raise InvalidRequest(FieldViolation("prompt", f"is not valid Unicode: {error.reason}")) from error
    violations = [*_prompt_violations(prompt, info), *_length_violations(request.max_tokens, len(prompt), info)]
    violations += [*_sampling_violations(request), *_stop_violations(request.stop_token_ids, info)]
    violations += _speculation_violations(request.speculation)
    if violations:
        raise InvalidRequest(*violations)
    return _resolve(request, prompt, info, defaults)


def _shown(value: str) -> str:
    """A client's own words for an error message, which has to fit into gRPC's metadata."""
    return repr(value if len(value) <= MAX_SHOWN_CHARS else f"{value[:MAX_SHOWN_CHARS]}...")


def _prompt_token_ids(prompt: str | Sequence[TokenId], model: ServedModel) -> tuple[TokenId, ...]:
    if not isinstance(prompt, str):
        return tuple(prompt)
    prompt.encode()  # raises on lone surrogates, of which the tokenizer only says that they are no string
    if not prompt:
        return ()  # empty stays empty, without a <s> before it
    most_chars = model.info.max_context * model.longest_token_chars
    if 0 < most_chars < len(prompt):  # found out before, and not by, tokenizing megabytes
        problem = f"has {len(prompt)} characters; no more than {most_chars} can fit"
        raise InvalidRequest(FieldViolation("prompt", f"{problem} in the context of {model.info.max_context} tokens"))
    # A batch of one: unlike `encode` it lets other threads run meanwhile.
    return tuple(model.tokenizer.encode_batch([prompt])[0].ids)


def _prompt_violations(prompt: Sequence[TokenId], info: ModelInfo) -> Iterator[FieldViolation]:
    if not prompt:
        yield FieldViolation("prompt", "is empty; give a text or at least one token")
    elif len(prompt) >= info.max_context:
        problem = f"has {len(prompt)} tokens; at most {info.max_context - 1} leave room for an answer"
        yield FieldViolation("prompt", f"{problem} in the context of {info.max_context}")
    else:
        yield from _token_violations("prompt", prompt, info)


def _token_violations(field: str, token_ids: Sequence[TokenId], info: ModelInfo) -> Iterator[FieldViolation]:
    outside = [id_ for id_ in token_ids if not 0 <= id_ < info.tokenizer_size]
    if outside:
        named = ", ".join(map(str, outside[:MAX_NAMED_TOKENS])) + (" ..." if len(outside) > MAX_NAMED_TOKENS else "")
        yield FieldViolation(field, f"token id {named} is outside the vocabulary [0, {info.tokenizer_size})")


def _length_violations(max_tokens: int | None, num_prompt: int, info: ModelInfo) -> Iterator[FieldViolation]:
    if max_tokens is None:
        return
    if max_tokens < 1:
        yield FieldViolation("max_tokens", f"is {max_tokens}; must be at least 1")
    elif num_prompt < info.max_context < num_prompt + max_tokens:
        problem = f"is {max_tokens}; with a prompt of {num_prompt} tokens at most {info.max_context - num_prompt} fit"
        yield FieldViolation("max_tokens", f"{problem} in the context of {info.max_context}; leave it out for that")


def _sampling_violations(request: GenerateRequest) -> Iterator[FieldViolation]:
    temperature, top_k, top_p, seed = request.temperature, request.top_k, request.top_p, request.seed
    if temperature is not None and not 0 <= temperature < math.inf:  # NaN fails every comparison
        yield FieldViolation("temperature", f"is {temperature}; must be a finite number of at least 0")
    if top_k is not None and top_k < 0:
        yield FieldViolation("top_k", f"is {top_k}; must be at least 0 (0 is off)")
    if top_p is not None and not 0 < top_p <= 1:
        yield FieldViolation("top_p", f"is {top_p}; must be above 0 and at most 1")
    if seed is not None and not 0 <= seed < 1 << 64:
        yield FieldViolation("seed", f"is {seed}; must be in [0, 2^64)")


def _stop_violations(stop_token_ids: Sequence[TokenId], info: ModelInfo) -> Iterator[FieldViolation]:
    if len(stop_token_ids) > MAX_STOP_TOKENS:
        yield FieldViolation("stop_token_ids", f"has {len(stop_token_ids)} tokens; at most {MAX_STOP_TOKENS}")
    else:
        yield from _token_violations("stop_token_ids", stop_token_ids, info)


def _speculation_violations(options: SpeculationOptions) -> Iterator[FieldViolation]:
    if options.policy and options.policy not in POLICY_NAMES:
        known = ", ".join(POLICY_NAMES)
        yield FieldViolation("speculation.policy", f"is {_shown(options.policy)}; must be one of {known}, or empty")
    if options.k is not None and not 0 <= options.k <= MAX_K:
        yield FieldViolation("speculation.k", f"is {options.k}; must be in [0, {MAX_K}]")
    if options.lookahead is not None and not 0 <= options.lookahead <= MAX_LOOKAHEAD:
        yield FieldViolation("speculation.lookahead", f"is {options.lookahead}; must be in [0, {MAX_LOOKAHEAD}]")
    if options.method and options.method not in METHOD_NAMES:
        known = ", ".join(METHOD_NAMES)
        yield FieldViolation("speculation.method", f"is {_shown(options.method)}; must be one of {known}, or empty")
    if options.draft_top_n is not None and not 1 <= options.draft_top_n <= MAX_DRAFT_TOP_N:
        problem = f"is {options.draft_top_n}; must be in [1, {MAX_DRAFT_TOP_N}]"
        yield FieldViolation("speculation.draft_top_n", problem)


def _resolve(
    request: GenerateRequest, prompt: tuple[TokenId, ...], info: ModelInfo, defaults: SpeculationDefaults
) -> Job:
    options = request.speculation
    k = defaults.max_k if options.k is None else options.k
    lookahead = options.lookahead
    if lookahead is None:  # a K of the request's own asks for the lookahead that goes with it
        lookahead = max(defaults.max_lookahead, 0 if options.k is None else lookahead_for(k, MAX_LOOKAHEAD))
    speculates = k > 0 and lookahead > 0 and not options.disabled
    stop = {*request.stop_token_ids, *(() if request.ignore_eos else info.eos_token_ids)}
    num_left = info.max_context - len(prompt)
    return Job(
        request_id=request.request_id or f"gen-{secrets.token_hex(8)}",
        prompt_token_ids=prompt,
        sampling=_sampling(request, info),
        max_length=len(prompt) + (num_left if request.max_tokens is None else request.max_tokens),
        stop_token_ids=tuple(sorted(stop)),
        policy=(options.policy or defaults.policy) if speculates else None,
        k=k,
        max_lookahead=lookahead,
        turns=options.turns,
    )


def _sampling(request: GenerateRequest, info: ModelInfo) -> Sampling:
    options = request.speculation
    method = Method(options.method) if options.method else Method.COUPLED
    return Sampling(
        temperature=request.temperature or 0.0,
        top_k=min(request.top_k or 0, info.vocab_size),  # more is the same as all, and must fit 32 bits
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=secrets.randbits(53) if request.seed is None else request.seed,
        method=method,
        draft_top_n=0 if method is Method.COUPLED else options.draft_top_n or DEFAULT_DRAFT_TOP_N,
    )
