"""What may be wrong with the sampling, logprobs and stopping of a request. docs/sampling.md says what each field does.

Ranges and names are those of vLLM and OpenAI where these have one; elsewhere our limits bound memory and time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rpc.errors import FieldViolation
from speculation.messages import ModelInfo, TokenId

if TYPE_CHECKING:
    from coordinator.requests import GenerateRequest

MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 64
MAX_TEXT_CHARS = 256
"""Of one stop string or bad word."""
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 1e3
MAX_LOGPROBS = 20
MAX_CHOICES = 64
LOGPROBS_MODES = ("raw", "processed")
MAX_NAMED_TOKENS = 3
MAX_SHOWN_CHARS = 60


def shown(value: str) -> str:
    """A client's own words for an error message, which has to fit into gRPC's metadata."""
    return repr(value if len(value) <= MAX_SHOWN_CHARS else f"{value[:MAX_SHOWN_CHARS]}...")


def token_violations(field: str, token_ids: Sequence[TokenId], info: ModelInfo) -> Iterator[FieldViolation]:
    """Names the first few ids that the tokenizer does not have."""
    outside = [id_ for id_ in token_ids if not 0 <= id_ < info.tokenizer_size]
    if outside:
        named = ", ".join(map(str, outside[:MAX_NAMED_TOKENS])) + (" ..." if len(outside) > MAX_NAMED_TOKENS else "")
        yield FieldViolation(field, f"token id {named} is outside the vocabulary [0, {info.tokenizer_size})")


def logit_violations(request: GenerateRequest, info: ModelInfo) -> Iterator[FieldViolation]:
    """Of what changes the logits or limits the choice: min-p, penalties, bias, bad words."""
    if request.min_p is not None and not 0 <= request.min_p <= 1:  # NaN fails every comparison
        yield FieldViolation("min_p", f"is {request.min_p}; must be in [0, 1] (0 is off)")
    repetition = request.repetition_penalty
    if repetition is not None and not 1 / MAX_REPETITION_PENALTY <= repetition <= MAX_REPETITION_PENALTY:
        bounds = f"[{1 / MAX_REPETITION_PENALTY:g}, {MAX_REPETITION_PENALTY:g}]"
        yield FieldViolation("repetition_penalty", f"is {repetition}; must be in {bounds} (1 is off)")
    yield from _penalty_violations("presence_penalty", request.presence_penalty)
    yield from _penalty_violations("frequency_penalty", request.frequency_penalty)
    yield from _bias_violations(request.logit_bias, info)
    yield from _text_violations("bad_words", request.bad_words, MAX_BAD_WORDS)


def _penalty_violations(field: str, value: float | None) -> Iterator[FieldViolation]:
    if value is not None and not -MAX_PENALTY <= value <= MAX_PENALTY:
        yield FieldViolation(field, f"is {value}; must be in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}] (0 is off)")


def _bias_violations(biases: Sequence[tuple[TokenId, float]], info: ModelInfo) -> Iterator[FieldViolation]:
    token_ids = [token_id for token_id, _ in biases]
    wrong = next(((token_id, bias) for token_id, bias in biases if not -MAX_BIAS <= bias <= MAX_BIAS), None)
    if len(biases) > MAX_BIASES:
        yield FieldViolation("logit_bias", f"has {len(biases)} tokens; at most {MAX_BIASES}")
    elif len(set(token_ids)) < len(token_ids):
        yield FieldViolation("logit_bias", "names a token twice; give each token one bias")
    elif wrong is not None:
        problem = f"of token {wrong[0]} is {wrong[1]}; must be in [-{MAX_BIAS:g}, {MAX_BIAS:g}]"
        yield FieldViolation("logit_bias", problem)
    else:
        yield from token_violations("logit_bias", token_ids, info)


def _text_violations(field: str, texts: Sequence[str], max_texts: int) -> Iterator[FieldViolation]:
    if len(texts) > max_texts:
        yield FieldViolation(field, f"has {len(texts)} texts; at most {max_texts}")
    elif any(not text for text in texts):
        yield FieldViolation(field, "has an empty text; leave it out")
    elif (longest := max(map(len, texts), default=0)) > MAX_TEXT_CHARS:
        yield FieldViolation(field, f"has a text of {longest} characters; at most {MAX_TEXT_CHARS}")
    elif any(_is_no_unicode(text) for text in texts):
        yield FieldViolation(field, "has a text that is not valid Unicode")


def _is_no_unicode(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def answer_violations(request: GenerateRequest, num_left: int) -> Iterator[FieldViolation]:
    """Of what is told and when it ends: choices, logprobs, stop strings, min_tokens.

    ``num_left`` is how many tokens the context leaves for the answer.
    """
    n, least = request.n, request.min_tokens
    most = num_left if request.max_tokens is None else request.max_tokens
    if n is not None and not 1 <= n <= MAX_CHOICES:
        yield FieldViolation("n", f"is {n}; must be in [1, {MAX_CHOICES}]")
    if least is not None and least < 0:
        yield FieldViolation("min_tokens", f"is {least}; must be at least 0")
    elif least is not None and least > most >= 1:  # otherwise `most` is what is wrong
        limit = "what the context leaves" if request.max_tokens is None else "max_tokens"
        yield FieldViolation("min_tokens", f"is {least}; must be at most {limit}, which is {most}")
    for field, num in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if num is not None and not 0 <= num <= MAX_LOGPROBS:
            yield FieldViolation(field, f"is {num}; must be in [0, {MAX_LOGPROBS}], or left out for none")
    if request.logprobs_mode and request.logprobs_mode not in LOGPROBS_MODES:
        known = ", ".join(LOGPROBS_MODES)
        problem = f"is {shown(request.logprobs_mode)}; must be one of {known}, or empty"
        yield FieldViolation("logprobs_mode", problem)
    yield from _text_violations("stop", request.stop, MAX_STOP_STRINGS)
