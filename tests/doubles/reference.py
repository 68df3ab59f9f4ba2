"""Decoding as the protocol defines it, written again and slowly: the whole sequence through transformers' own forward
for every token, no cache, noise and warping in numpy. Shares no code with what it checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def gumbel(seed: int, position: int, token_id: int, stream: int = 0) -> float:
    """docs/protocol.md, "Noise", one number at a time."""
    value = seed & _MASK
    for n in (stream, position, token_id):
        value = _mix64((value + (n + 1) * _GOLDEN) & _MASK)
    u = min((value >> 11) + 1, 2**53 - 1) / 2**53
    return -math.log(-math.log(u))


@dataclass(frozen=True)
class Parameters:
    """What a request may ask for; the field names are SamplingRow's and Sampling's."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0


def adjust(
    logits: np.ndarray, parameters: Parameters, prompt: Sequence[int], output: Sequence[int], stop: Sequence[int]
) -> np.ndarray:
    """One row of logits [V] after bans, bias and penalties; docs/sampling.md, one token at a time."""
    scores = logits.astype(np.float32).copy()
    if len(output) < parameters.min_tokens:
        scores[list(stop)] = -np.inf
    for *start, last in parameters.bad_words:
        if list(output[len(output) - len(start) :]) == start and len(start) <= len(output):
            scores[last] = -np.inf
    for token_id, bias in parameters.logit_bias:
        scores[token_id] += np.float32(bias)
    for token_id in {*prompt, *output}:
        if scores[token_id] > 0:
            scores[token_id] /= np.float32(parameters.repetition_penalty)
        else:
            scores[token_id] *= np.float32(parameters.repetition_penalty)
    for token_id in set(output):
        scores[token_id] -= np.float32(parameters.frequency_penalty) * np.float32(output.count(token_id))
        scores[token_id] -= np.float32(parameters.presence_penalty)
    return scores


def draw(logits: np.ndarray, parameters: Parameters, position: int) -> int:
    """The token at ``position``, from one row of adjusted logits [V]."""
    if parameters.temperature == 0:
        return int(logits.argmax())
    scores = logits / np.float32(parameters.temperature)
    order = np.argsort(-scores, kind="stable")
    if parameters.min_p:
        order = order[scores[order] >= scores.max() + np.float32(math.log(parameters.min_p))]
    if 0 < parameters.top_k < len(order):
        order = order[: parameters.top_k]
    if parameters.top_p < 1:
        probabilities = np.exp(scores[order].astype(np.float64) - scores[order].max())
        probabilities /= probabilities.sum()
        order = order[: int((np.cumsum(probabilities) - probabilities < parameters.top_p).sum())]
    keys = [float(scores[token_id]) + gumbel(parameters.seed, position, int(token_id)) for token_id in order]
    return int(order[int(np.argmax(keys))])


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompt: Sequence[int],
    parameters: Parameters,
    max_tokens: int,
    stop_token_ids: Sequence[int] = (),
    allowed: Callable[[Sequence[int]], np.ndarray] | None = None,
) -> list[int]:
    """Up to ``max_tokens`` tokens after ``prompt``, a stop token included.

    ``allowed``, if given, says of each token whether it may follow an answer: bool [V].
    """
    output: list[int] = []
    while len(output) < max_tokens:
        logits = model(torch.tensor([[*prompt, *output]]), use_cache=False).logits[0, -1].float().numpy()
        adjusted = adjust(logits, parameters, prompt, output, stop_token_ids)
        if allowed is not None:
            kept = np.where(allowed(output), adjusted, -np.inf)
            adjusted = kept if kept.max() > -np.inf else np.where(allowed(output), logits, -np.inf)
        output.append(draw(adjusted, parameters, len(prompt) + len(output)))
        if output[-1] in stop_token_ids:
            break
    return output
