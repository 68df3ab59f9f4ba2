"""What a client sees of its request, whatever door it came through: started, tokens (many times), finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from speculation.messages import FinishReason, TokenId
from speculation.relay import SessionStats


@dataclass(frozen=True, slots=True)
class StartedEvent:
    """The request has been admitted."""

    request_id: str
    model: str
    num_prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token and the text it completed, which may be empty."""

    token_id: TokenId
    text: str
    drafted: bool


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """What one verify step committed. Without tokens: the rest of the text, at the end."""

    text: str
    tokens: tuple[TokenPiece, ...]
    num_drafted: int
    k: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from the request's arrival at the coordinator."""

    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The request is done; the last event."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    stats: SessionStats
    policy: str
    """Which policy chose K; "off" for plain decoding."""
    timing: Timing


GenerateEvent: TypeAlias = StartedEvent | TokensEvent | FinishedEvent
