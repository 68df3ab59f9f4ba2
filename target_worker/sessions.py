"""The sessions of a target worker: who owns them, and how much of each is in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from inference import Runtime, SequenceId
from rpc.engine_host import ConnectionId
from speculation.messages import SessionId
from speculation.verifier import VerifierSession

SessionKey: TypeAlias = tuple[ConnectionId, SessionId]
"""Session ids belong to a connection; two coordinators may use the same."""


@dataclass(slots=True)
class StepEntry:
    """What one session contributes to one forward pass."""

    session: TargetSession
    token_ids: list[int]
    """Uncached committed tokens, then the drafted ones."""
    drafted: list[int]
    is_complete: bool
    """False for a prefill chunk that does not reach the last committed token: nothing is drawn for it."""

    @property
    def num_logits(self) -> int:
        return len(self.drafted) + 1 if self.is_complete else 0

    def without_drafted(self) -> StepEntry:
        """The same step for this session, as plain decoding."""
        token_ids = self.token_ids[: len(self.token_ids) - len(self.drafted)]
        return StepEntry(self.session, token_ids, [], self.is_complete)


@dataclass(slots=True)
class TargetSession:
    """A session and its KV sequence. Between steps the cache holds committed tokens only."""

    key: SessionKey
    verifier: VerifierSession
    sequence: SequenceId
    num_cached: int = 0

    @property
    def num_uncached(self) -> int:
        """Committed tokens that have not been through the model; 1 between steps of plain decoding."""
        return len(self.verifier.token_ids) - self.num_cached

    @property
    def is_decoding(self) -> bool:
        return self.num_uncached == 1

    def decode_entry(self, num_drafted: int) -> StepEntry:
        """The last committed token and up to ``num_drafted`` staged ones."""
        drafted = self.verifier.drafted(num_drafted)
        return StepEntry(self, [self.verifier.token_ids[-1], *drafted], drafted, is_complete=True)

    def prefill_entry(self, max_tokens: int) -> StepEntry:
        """The next uncached tokens; complete when they reach the last committed one."""
        stop = min(len(self.verifier.token_ids), self.num_cached + max_tokens)
        token_ids = list(self.verifier.token_ids[self.num_cached : stop])
        return StepEntry(self, token_ids, [], is_complete=stop == len(self.verifier.token_ids))

    def roll_back(self, runtime: Runtime) -> None:
        """After a step: the cache keeps what was committed before the target's own, newest token."""
        self.num_cached = len(self.verifier.token_ids) - 1
        runtime.truncate(self.sequence, self.num_cached)

    def preempt(self, runtime: Runtime) -> None:
        """Gives all KV memory back; the session is computed again when there is room."""
        self.num_cached = 0
        runtime.truncate(self.sequence, 0)
