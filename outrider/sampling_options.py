"""What a request may ask of sampling and logprobs beyond temperature, top-k and top-p, as the client's keywords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

from protos import common_pb2
from protos import generation_pb2 as pb
from rpc.errors import FieldViolation, InvalidRequest

_INTEGERS = ("min_tokens", "n", "logprobs", "prompt_logprobs")


class SamplingOptions(TypedDict, total=False):
    """As the fields of ``GenerateRequest``; docs/sampling.md says what each does. None, or left out, is the default."""

    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float]
    """By token id."""
    bad_words: Sequence[str]
    min_tokens: int | None
    n: int | None
    """With more than one, the events of all choices come mixed; `collect` takes one of them."""
    logprobs: int | None
    prompt_logprobs: int | None
    logprobs_mode: str
    stop: Sequence[str]
    include_stop_str_in_output: bool


def set_options(request: pb.GenerateRequest, **options: Unpack[SamplingOptions]) -> None:
    """Raises `InvalidRequest` for an integer that its wire type cannot hold, and `TypeError` for what is no option; the
    server checks everything else."""
    if unknown := options.keys() - SamplingOptions.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    biases = options.pop("logit_bias", {})
    for token_id, bias in biases.items():
        _check_fits("logit_bias", token_id, 0, 2**32)
        request.logit_bias.append(common_pb2.TokenBias(token_id=token_id, bias=bias))
    for name, value in options.items():
        if name in _INTEGERS and isinstance(value, int):
            _check_fits(name, value, -(2**63), 2**63)
        if name in ("bad_words", "stop"):
            getattr(request, name).extend([value] if isinstance(value, str) else value)
        elif value is not None:
            setattr(request, name, value)


def _check_fits(name: str, value: int, start: int, stop: int) -> None:
    if not start <= value < stop:
        raise InvalidRequest(FieldViolation(name, f"has to be in [{start}, {stop}), got {value}"))
