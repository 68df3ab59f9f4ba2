"""What a client sees of its request, whatever door it came through: started, tokens (many times), finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from coordinator.step_trace import StepTrace
from speculation.messages import FinishReason, TokenId, TokenLogprobs
from speculation.session_stats import SessionStats


@dataclass(frozen=True, slots=True)
class StartedEvent:
    """The request has been admitted."""

    request_id: str
    model: str
    num_prompt_tokens: int
    seed: int
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """If asked for: of the prompt's tokens from the second on."""


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token and the text it completed, which may be empty."""

    token_id: TokenId
    text: str
    drafted: bool
    logprobs: TokenLogprobs | None = None
    """If asked for."""
    looked_up: bool = False
    """The target had found it in the sequence before it drew it."""


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """What one verify step committed. Without tokens: the rest of the text, at the end."""

    text: str
    tokens: tuple[TokenPiece, ...]
    num_drafted: int
    k: int
    choice: int = 0
    """Which of the request's ``n`` answers."""
    trace: StepTrace | None = None
    """If asked for, and there are tokens."""
    num_looked_up: int = 0
    """Tokens that the step verified behind the drafted ones."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from the request's arrival at the coordinator."""

    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """A choice is done; the request is when all its choices are."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    stats: SessionStats
    policy: str
    """Which policy chose K; "off" for plain decoding."""
    timing: Timing
    choice: int = 0
    stop_reason: str | TokenId | None = None
    """The stop string, or the one of the request's own stop tokens, that ended it."""
    estimated_speedup: float = 0.0
    """Over plain decoding, see `speculation.speedup`; 0 if unknown, or decoded plainly."""


GenerateEvent: TypeAlias = StartedEvent | TokensEvent | FinishedEvent
