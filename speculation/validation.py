"""What a worker checks before it opens a session. The text goes to the coordinator as a session error."""

from __future__ import annotations

import math

from speculation.draft_distribution import MAX_DRAFT_TOP_N
from speculation.messages import Method, OpenDraft, OpenTarget, Sampling, SessionError, SessionErrorCode


def check_open_target(command: OpenTarget, vocab_size: int, max_context: int) -> SessionError | None:
    """None if the session can be opened."""
    error = _check_open(command, vocab_size)
    length = len(command.token_ids)
    if error is None and not length < command.max_length <= max_context:
        error = SessionError(
            SessionErrorCode.CONTEXT_OVERFLOW,
            f"max_length is {command.max_length}; it has to be above the {length} tokens given "
            f"and at most the model's context of {max_context}",
        )
    return error


def check_open_draft(command: OpenDraft, vocab_size: int, max_context: int) -> SessionError | None:
    """None if the session can be opened."""
    error = _check_open(command, vocab_size)
    if error is None and len(command.token_ids) >= max_context:
        error = SessionError(
            SessionErrorCode.CONTEXT_OVERFLOW,
            f"{len(command.token_ids)} tokens leave no room in the draft model's context of {max_context}",
        )
    return error


def _check_open(command: OpenTarget | OpenDraft, vocab_size: int) -> SessionError | None:
    if not command.token_ids:
        return SessionError(SessionErrorCode.INVALID, "token_ids is empty; a session needs at least one token")
    if max(command.token_ids) >= vocab_size:
        message = f"token id {max(command.token_ids)} is outside the vocabulary [0, {vocab_size})"
        return SessionError(SessionErrorCode.INVALID, message)
    if command.sampling.prompt_length > len(command.token_ids):
        message = f"prompt_length is {command.sampling.prompt_length}; there are {len(command.token_ids)} tokens"
        return SessionError(SessionErrorCode.INVALID, message)
    return _check_sampling(command.sampling)


def _check_sampling(sampling: Sampling) -> SessionError | None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        return SessionError(SessionErrorCode.INVALID, f"temperature is {sampling.temperature}; it has to be >= 0")
    if not 0 < sampling.top_p <= 1:
        return SessionError(SessionErrorCode.INVALID, f"top_p is {sampling.top_p}; it has to be in (0, 1]")
    if sampling.method is Method.UNKNOWN:
        return SessionError(SessionErrorCode.INVALID, "method is not known here; update this worker or ask for another")
    if sampling.by_ratio and not 1 <= sampling.draft_top_n <= MAX_DRAFT_TOP_N:
        problem = f"draft_top_n is {sampling.draft_top_n}; it has to be in [1, {MAX_DRAFT_TOP_N}]"
        return SessionError(SessionErrorCode.INVALID, problem)
    if not 0 <= sampling.min_p <= 1:
        return SessionError(SessionErrorCode.INVALID, f"min_p is {sampling.min_p}; it has to be in [0, 1]")
    return _check_logits(sampling)


def _check_logits(sampling: Sampling) -> SessionError | None:
    """Token ids are not checked: one that a model does not have is none that it could draw."""
    if not 0 < sampling.repetition_penalty < math.inf:
        message = f"repetition_penalty is {sampling.repetition_penalty}; it has to be above 0 and finite"
        return SessionError(SessionErrorCode.INVALID, message)
    added = {
        "presence_penalty": [sampling.presence_penalty],
        "frequency_penalty": [sampling.frequency_penalty],
        "logit_bias": [bias for _, bias in sampling.logit_bias],
    }
    for name, values in added.items():
        if not all(map(math.isfinite, values)):
            return SessionError(SessionErrorCode.INVALID, f"{name} has a value that is not finite")
    return None
