"""The sessions of a target worker: who owns them, and their place in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from grammar import GrammarPath
from inference import Runtime, SequenceId, SequenceRows
from rpc.engine_host import ConnectionId
from speculation.messages import SessionId, TokenLogprobs
from speculation.step_schedule import CachedSession, StepEntry

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
    waits_for: SessionKey | None = None
    """In no step before that session has computed the prompt that both begin with."""

    @property
    def num_shareable(self) -> int:
        """Tokens whose keys and values may be taken over: the last one has to be run for its logits."""
        return len(self.verifier.token_ids) - 1

    def can_share_with(self, other: TargetSession) -> bool:
        """Whether ``other`` begins with all tokens of this one but the last, and there are any."""
        num = self.num_shareable
        own, others = self.verifier.token_ids[:num], other.verifier.token_ids[:num]
        return num > 0 and own == others

    def fork(self, other: TargetSession, runtime: Runtime) -> None:
        """Shares what ``other`` has computed. Raises `OutOfKVBlocks`; nothing has changed then."""
        sequence = runtime.fork(other.sequence)
        runtime.free(self.sequence)
        runtime.truncate(sequence, self.num_shareable)
        self.sequence, self.num_cached = sequence, self.num_shareable

    def roll_back(self, runtime: Runtime) -> None:
        """After a step: drafted tokens leave the cache, accepted ones stay."""
        self.forget_uncommitted()
        runtime.truncate(self.sequence, self.num_cached)

    def preempt(self, runtime: Runtime) -> None:
        """Gives all KV memory back; the session is computed again when there is room."""
        self.num_cached = 0
        runtime.truncate(self.sequence, 0)


TargetEntry: TypeAlias = StepEntry[TargetSession]
