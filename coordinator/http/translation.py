"""A body of OpenAI's API as the engine's request. What the engine has is translated in `to_request`, one line a field;
what it has not is in `_REFUSED`, with the values that ask for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from coordinator.http.bodies import ChatBody, CompletionBody, GenerationBody, SpeculationBody
from coordinator.http.structured import structure_of
from coordinator.requests import GenerateRequest, SpeculationOptions
from coordinator.structured_output import FIELDS
from rpc.errors import FieldViolation, InvalidRequest
from speculation.messages import Grammar, TokenId

DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own for ``/v1/completions``; a chat goes on as long as the context allows."""

_NONE: tuple[Any, ...] = (None,)
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "prompt_logprobs": _NONE,
    "echo": (False,),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": _NONE,
    "prediction": _NONE,
    "reasoning_effort": (None, "none"),
    "verbosity": _NONE,
    "web_search_options": _NONE,
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
}
"""Fields that are not served, and the values with which they may be there nevertheless."""


def to_request(
    body: GenerationBody,
    prompt: str | Sequence[TokenId],
    max_tokens: int | None,
    request_id: str,
    add_special_tokens: bool = True,
) -> GenerateRequest:
    """The engine's request for one prompt. Raises `InvalidRequest` naming every field that is not served."""
    check_served(body)
    structure = structure_of(body)
    return GenerateRequest(
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        top_k=0 if body.top_k == -1 else body.top_k,
        top_p=body.top_p,
        seed=body.seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body.logit_bias),
        bad_words=tuple(body.bad_words or ()),
        min_tokens=body.min_tokens,
        n=body.n,
        logprobs=num_logprobs(body),
        stop=_stop_strings(body.stop),
        include_stop_str_in_output=body.include_stop_str_in_output,
        structured_output=None if structure is None else Grammar(structure.kind, structure.text),
        speculation=speculation_options(body.speculation),
        request_id=request_id,
        add_special_tokens=add_special_tokens,
    )


def speculation_options(body: SpeculationBody) -> SpeculationOptions:
    return SpeculationOptions(
        disabled=not body.enabled,
        policy=body.policy or "",
        k=body.k,
        lookahead=body.lookahead,
        method=body.method or "",
        draft_top_n=body.draft_top_n,
        turns=body.turns,
        traces=body.trace,
    )


def completion_tokens(body: CompletionBody) -> int:
    """Most tokens to generate for a completion."""
    return DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens


def chat_tokens(body: ChatBody) -> int | None:
    """Most tokens to generate for a chat; None: as many as fit. Raises `InvalidRequest` if its two names disagree."""
    given = {value for value in (body.max_tokens, body.max_completion_tokens) if value is not None}
    if len(given) > 1:
        problem = f"is {body.max_completion_tokens}, but max_tokens is {body.max_tokens}; give one of them"
        raise InvalidRequest(FieldViolation("max_completion_tokens", problem))
    return next(iter(given), None)


def num_logprobs(body: GenerationBody) -> int | None:
    """How many of the most likely tokens to tell beside each; None: no logprobs at all."""
    if isinstance(body, ChatBody):
        if not body.logprobs and body.top_logprobs:
            raise InvalidRequest(FieldViolation("top_logprobs", "needs logprobs; set logprobs to true"))
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionBody) else None


@contextmanager
def named_as_in(body: GenerationBody) -> Iterator[None]:
    """Within, complaints of the engine name the fields as the body does."""
    names = {"prompt": "messages", "logprobs": "top_logprobs"} if isinstance(body, ChatBody) else {}
    structure = structure_of(body)
    if structure is not None:
        names[FIELDS[structure.kind]] = structure.field
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    try:
        yield
    except InvalidRequest as error:
        named = [FieldViolation(names.get(v.field, v.field), v.description) for v in error.violations]
        raise InvalidRequest(*named) from error


def _logit_bias(given: Mapping[str, float] | None) -> tuple[tuple[TokenId, float], ...]:
    """OpenAI's keys are token ids in quotes."""
    try:
        return tuple((int(token_id), bias) for token_id, bias in (given or {}).items())
    except ValueError as error:
        raise InvalidRequest(FieldViolation("logit_bias", "has a key that is no token id")) from error


def _stop_strings(given: str | Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,) if given else ()
    return tuple(given or ())


def prompts_of(body: CompletionBody) -> list[str | Sequence[TokenId]]:
    """One or several prompts, always as a list."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    several = [part for part in body.prompt if not isinstance(part, int)]
    return [*several] if several else [[part for part in body.prompt if isinstance(part, int)]]


def check_served(body: GenerationBody) -> None:
    """Raises `InvalidRequest` if the body asks for something that this server does not do: never silence."""
    violations = list(_unserved(body))
    if violations:
        raise InvalidRequest(*violations)


def _unserved(body: GenerationBody) -> Iterator[FieldViolation]:
    for name, harmless in _REFUSED.items():
        value = getattr(body, name, harmless[0])
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in harmless):
            yield FieldViolation(name, "is not supported by this server; leave it out")
    if isinstance(body, CompletionBody) and body.best_of not in (None, body.n or 1):
        yield FieldViolation("best_of", "is not supported; leave it out, and choose among n yourself")
    if body.stream_options is not None and not body.stream:
        yield FieldViolation("stream_options", "is for streams; leave it out, or set stream to true")
