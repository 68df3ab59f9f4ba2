"""What clients ask for, and what of it can be done.

`GenerateRequest` is a request as the client said it, whatever door it came through; `validate` turns it into a `Job`
with every default filled in, or names everything that is wrong with it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from coordinator.sampling_checks import answer_violations, logit_violations, shown, token_violations
from coordinator.structured_output import FIELD, FIELDS
from coordinator.vocabulary import ServedModel
from rpc.errors import FieldViolation, InvalidRequest, ModelNotFound
from speculation.adaptive_k import POLICY_NAMES
from speculation.draft_distribution import MAX_DRAFT_TOP_N
from speculation.fingerprint import Fingerprint, extend
from speculation.messages import Grammar, LogprobOptions, Method, ModelInfo, Sampling, TokenId
from speculation.relay import lookahead_for

MAX_STOP_TOKENS = 64
MAX_K = 64
MAX_LOOKAHEAD = 256

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
    traces: bool = False
    """Tell of each step what `coordinator.step_trace` has."""


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
    structured_output: Grammar | None = None
    """Here checked for contradictions only; `coordinator.structured_output` tries whether it compiles."""
    request_id: str = ""
    """Empty: one is made up."""
    add_special_tokens: bool = True
    """Let the tokenizer add what it adds to a text, such as a beginning-of-text token. A chat template has its own."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Sequence[tuple[TokenId, float]] = ()
    bad_words: Sequence[str] = ()
    min_tokens: int | None = None
    n: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: str = ""
    stop: Sequence[str] = ()
    include_stop_str_in_output: bool = False


@dataclass(frozen=True, slots=True)
class SpeculationDefaults:
    """The deployment's choice where a request has none."""

    policy: str
    max_k: int
    max_lookahead: int


@dataclass(frozen=True, slots=True)
class Stopping:
    """What the coordinator, which has the text, does about the end of an answer."""

    strings: tuple[str, ...] = ()
    token_ids: tuple[TokenId, ...] = ()
    """Those of the request's own: told as the reason, unlike the model's end-of-text tokens."""
    keeps_stop: bool = False
    """The stop string, or the stop token's text, stays in the answer."""
    min_tokens: int = 0
    """A stop string counts if a later token than these completes it."""


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
    traces: bool = False
    n: int = 1
    logprobs: LogprobOptions | None = None
    prompt_logprobs: int | None = None
    stop: Stopping = Stopping()

    def of_choice(self, choice: int) -> Job:
        """The same for one of the ``n`` choices: with a seed of its own, and the prompt's logprobs with the first.

        Choice 0 has the request's seed, so it says what a request for one answer says.
        """
        if choice == 0:
            return self
        seed = extend(Fingerprint(self.sampling.seed), choice)
        return replace(self, sampling=replace(self.sampling, seed=seed), prompt_logprobs=None)


def validate(request: GenerateRequest, model: ServedModel, defaults: SpeculationDefaults) -> Job:
    """Fills in the defaults. Tokenizes the prompt, so it takes about a millisecond per 10,000 characters.

    Raises `ModelNotFound`, and `InvalidRequest` with every bad field, its value and the limit.
    """
    info = model.info
    if request.model not in ("", info.name):
        raise ModelNotFound(f"model {shown(request.model)} is not served here; use {info.name!r} or leave it empty")
    try:
        prompt = _prompt_token_ids(request.prompt, model, request.add_special_tokens)
    except UnicodeEncodeError as error:
        raise InvalidRequest(FieldViolation("prompt", f"is not valid Unicode: {error.reason}")) from error
    violations = [*_prompt_violations(prompt, info), *_length_violations(request.max_tokens, len(prompt), info)]
    violations += [*_sampling_violations(request), *_stop_violations(request.stop_token_ids, info)]
    violations += [*logit_violations(request, info), *answer_violations(request, info.max_context - len(prompt))]
    violations += [*_speculation_violations(request.speculation), *_structure_violations(request)]
    if violations:
        raise InvalidRequest(*violations)
    return _resolve(request, prompt, model, defaults)


def _prompt_token_ids(
    prompt: str | Sequence[TokenId], model: ServedModel, add_special_tokens: bool
) -> tuple[TokenId, ...]:
    if not isinstance(prompt, str):
        return tuple(prompt)
    return text_token_ids(prompt, model, add_special_tokens)


def text_token_ids(prompt: str, model: ServedModel, add_special_tokens: bool = True) -> tuple[TokenId, ...]:
    """The tokens of a text. Raises `UnicodeEncodeError`, and `InvalidRequest` for what cannot fit the context."""
    prompt.encode()  # raises on lone surrogates, of which the tokenizer only says that they are no string
    if not prompt:
        return ()  # empty stays empty, without a <s> before it
    most_chars = model.info.max_context * model.longest_token_chars
    if 0 < most_chars < len(prompt):  # found out before, and not by, tokenizing megabytes
        problem = f"has {len(prompt)} characters; no more than {most_chars} can fit"
        raise InvalidRequest(FieldViolation("prompt", f"{problem} in the context of {model.info.max_context} tokens"))
    # A batch of one: unlike `encode` it lets other threads run meanwhile.
    return tuple(model.tokenizer.encode_batch([prompt], add_special_tokens=add_special_tokens)[0].ids)


def _prompt_violations(prompt: Sequence[TokenId], info: ModelInfo) -> Iterator[FieldViolation]:
    if not prompt:
        yield FieldViolation("prompt", "is empty; give a text or at least one token")
    elif len(prompt) >= info.max_context:
        problem = f"has {len(prompt)} tokens; at most {info.max_context - 1} leave room for an answer"
        yield FieldViolation("prompt", f"{problem} in the context of {info.max_context}")
    else:
        yield from token_violations("prompt", prompt, info)


def _length_violations(max_tokens: int | None, num_prompt: int, info: ModelInfo) -> Iterator[FieldViolation]:
    if max_tokens is None:
        return
    if max_tokens < 1:
        yield FieldViolation("max_tokens", f"is {max_tokens}; must be at least 1")
    elif num_prompt < info.max_context < num_prompt + max_tokens:
        problem = f"is {max_tokens}; with a prompt of {num_prompt} tokens at most {info.max_context - num_prompt} fit"
        yield FieldViolation("max_tokens", f"{problem} in the context of {info.max_context}")


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
        yield from token_violations("stop_token_ids", stop_token_ids, info)


def _speculation_violations(options: SpeculationOptions) -> Iterator[FieldViolation]:
    if options.policy and options.policy not in POLICY_NAMES:
        known = ", ".join(POLICY_NAMES)
        yield FieldViolation("speculation.policy", f"is {shown(options.policy)}; must be one of {known}, or empty")
    if options.k is not None and not 0 <= options.k <= MAX_K:
        yield FieldViolation("speculation.k", f"is {options.k}; must be in [0, {MAX_K}]")
    if options.lookahead is not None and not 0 <= options.lookahead <= MAX_LOOKAHEAD:
        yield FieldViolation("speculation.lookahead", f"is {options.lookahead}; must be in [0, {MAX_LOOKAHEAD}]")
    if options.method and options.method not in METHOD_NAMES:
        known = ", ".join(METHOD_NAMES)
        yield FieldViolation("speculation.method", f"is {shown(options.method)}; must be one of {known}, or empty")
    if options.draft_top_n is not None and not 1 <= options.draft_top_n <= MAX_DRAFT_TOP_N:
        problem = f"is {options.draft_top_n}; must be in [1, {MAX_DRAFT_TOP_N}]"
        yield FieldViolation("speculation.draft_top_n", problem)


def _structure_violations(request: GenerateRequest) -> Iterator[FieldViolation]:
    if request.structured_output is None:
        return
    if request.structured_output.kind not in FIELDS:
        yield FieldViolation(FIELD, f"says nothing; set one of {', '.join(FIELDS.values())}, or leave it out")
    if request.ignore_eos:
        problem = "contradicts structured_output: where that is complete, only an end-of-text token may follow"
        yield FieldViolation("ignore_eos", problem)


def _resolve(
    request: GenerateRequest, prompt: tuple[TokenId, ...], model: ServedModel, defaults: SpeculationDefaults
) -> Job:
    info = model.info
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
        sampling=_sampling(request, len(prompt), model),
        max_length=len(prompt) + (num_left if request.max_tokens is None else request.max_tokens),
        stop_token_ids=tuple(sorted(stop)),
        policy=(options.policy or defaults.policy) if speculates else None,
        k=k,
        max_lookahead=lookahead,
        turns=options.turns,
        traces=options.traces,
        n=request.n or 1,
        logprobs=_logprobs(request),
        prompt_logprobs=request.prompt_logprobs,
        stop=Stopping(
            strings=tuple(request.stop),
            token_ids=tuple(sorted(stop - (set() if request.ignore_eos else set(info.eos_token_ids)))),
            keeps_stop=request.include_stop_str_in_output,
            min_tokens=request.min_tokens or 0,
        ),
    )


def _logprobs(request: GenerateRequest) -> LogprobOptions | None:
    if request.logprobs is None:
        return None
    return LogprobOptions(request.logprobs, request.logprobs_mode == "processed")


def _sampling(request: GenerateRequest, num_prompt: int, model: ServedModel) -> Sampling:
    repetition, options = request.repetition_penalty, request.speculation
    method = Method(options.method) if options.method else Method.COUPLED
    return Sampling(
        temperature=request.temperature or 0.0,
        top_k=min(request.top_k or 0, model.info.vocab_size),  # more is the same as all, and must fit 32 bits
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=secrets.randbits(53) if request.seed is None else request.seed,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if repetition is None else repetition,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=tuple(request.logit_bias),
        bad_words=_bad_word_tokens(request.bad_words, model),
        min_length=num_prompt + request.min_tokens if request.min_tokens else 0,
        prompt_length=num_prompt,
        grammar=request.structured_output,
        method=method,
        draft_top_n=0 if method is Method.COUPLED else options.draft_top_n or DEFAULT_DRAFT_TOP_N,
    )


def _bad_word_tokens(words: Sequence[str], model: ServedModel) -> tuple[tuple[TokenId, ...], ...]:
    """The tokens of each word, at the beginning of a text and after a space, as vLLM has them."""
    found: dict[tuple[TokenId, ...], None] = {}
    for word in words:
        plain, spaced = (
            tuple(model.tokenizer.encode(before + (word.lstrip() or word), add_special_tokens=False).ids)
            for before in ("", " ")
        )
        if plain:
            found[plain] = None
        # A space that became a token of its own would forbid that, and not the word.
        if spaced and len(spaced) == len(plain) and spaced[0] != plain[0]:
            found[spaced] = None
    return tuple(found)
