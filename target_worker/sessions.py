"""The sessions of a target worker: who owns them, and their place in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from grammar import GrammarPath
from inference import Runtime, SequenceId, SequenceRows
from rpc.engine_host import ConnectionId
from speculation.messages import SessionId, TokenLogprobs
from speculation.step_schedule import CachedSession, StepEntry
from telemetry.tracing import NO_SPAN, Span

SessionKey: TypeAlias = tuple[ConnectionId, SessionId]
"""Session ids belong to a connection; two coordinators may use the same."""


@dataclass(slots=True, kw_only=True)
class TargetSession(CachedSession):
    """A session and its KV sequence."""

    key: SessionKey
    sequence: SequenceId
    rows: SequenceRows
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as it has been prefilled, until the first verdict has them."""
    path: GrammarPath | None = None
    """Where the answer stands in its grammar; None: anything may be said."""
    span: Span = field(default=NO_SPAN)

    def roll_back(self, runtime: Runtime) -> None:
        """After a step: drafted tokens leave the cache, accepted ones stay."""
        self.forget_uncommitted()
        runtime.truncate(self.sequence, self.num_cached)

    def preempt(self, runtime: Runtime) -> None:
        """Gives all KV memory back; the session is computed again when there is room."""
        self.num_cached = 0
        runtime.truncate(self.sequence, 0)


TargetEntry: TypeAlias = StepEntry[TargetSession]
