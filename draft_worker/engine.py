"""The drafter on the model thread: one packed batch per step, one more token for every session that wants one.

A session drafts as long as it is below its lookahead; what a commit made stale is gone before the next step. What is
drafted leaves in frames: at once while the target may be waiting for it, a few tokens together when it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from inference import Chunk, OutOfKVBlocks, Runtime, SamplingRow, SequenceId, StepResult, draw
from rpc.codec import DraftFrame
from rpc.engine_host import ConnectionId, Hangup, Submitted
from speculation.drafter import CommitMismatch, DrafterSession
from speculation.messages import (
    CloseSession,
    Commit,
    DraftCommand,
    DraftEvent,
    OpenDraft,
    SessionError,
    SessionErrorCode,
    SessionId,
    SetLookahead,
)
from speculation.validation import check_open_draft

EngineCommand: TypeAlias = Submitted[DraftCommand] | Hangup
EngineOutput: TypeAlias = tuple[ConnectionId, DraftFrame]
SessionKey: TypeAlias = tuple[ConnectionId, SessionId]


@dataclass(slots=True)
class _Session:
    key: SessionKey
    drafter: DrafterSession
    sequence: SequenceId


class DraftEngine:
    """All sessions of one draft worker. Every method runs on the model thread."""

    def __init__(self, runtime: Runtime, vocab_size: int, max_step_tokens: int, flush_tokens: int) -> None:
        """``vocab_size`` is the tokenizer's size. At most ``flush_tokens`` drafted
        tokens of a session wait to leave together."""
        self._runtime = runtime
        self._vocab_size = vocab_size
        self._max_step_tokens = max_step_tokens
        self._flush_tokens = flush_tokens
        self._sessions: dict[SessionKey, _Session] = {}
        self._errors: list[tuple[SessionKey, SessionError]] = []

    # -- commands -----------------------------------------------------------------------------------------------

    def apply(self, commands: Sequence[EngineCommand]) -> None:
        """Brings the sessions up to date with what arrived since the last step."""
        for command in commands:
            if isinstance(command, Hangup):
                for key in [key for key in self._sessions if key[0] == command.connection]:
                    self._drop(key)
            else:
                for session_id, item in command.items:
                    self._apply_item((command.connection, session_id), item)

    def _apply_item(self, key: SessionKey, item: DraftCommand) -> None:
        session = self._sessions.get(key)
        if isinstance(item, OpenDraft):
            self._open(key, item)
        elif isinstance(item, CloseSession):
            self._drop(key)
        elif session is None:
            message = f"session {key[1]} is not open here; send Open with the committed tokens"
            self._errors.append((key, SessionError(SessionErrorCode.UNKNOWN_SESSION, message)))
        elif isinstance(item, SetLookahead):
            session.drafter.set_lookahead(item.lookahead)
            self._runtime.truncate(session.sequence, session.drafter.num_cached)
        else:
            self._commit(session, item)

    def _open(self, key: SessionKey, command: OpenDraft) -> None:
        error = check_open_draft(command, self._vocab_size, self._runtime.max_context)
        if key in self._sessions:
            error = SessionError(SessionErrorCode.DUPLICATE_SESSION, f"session {key[1]} is open already")
        if error is not None:
            self._fail(key, error)
            return
        drafter = DrafterSession(command, self._vocab_size, self._runtime.max_context)
        self._sessions[key] = _Session(key, drafter, self._runtime.open())

    def _commit(self, session: _Session, command: Commit) -> None:
        try:
            session.drafter.commit(command)
        except CommitMismatch as error:
            self._fail(session.key, SessionError(SessionErrorCode.INVALID, str(error)))
            return
        self._runtime.truncate(session.sequence, session.drafter.num_cached)

    def _drop(self, key: SessionKey) -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            self._runtime.free(session.sequence)

    def _fail(self, key: SessionKey, error: SessionError) -> None:
        self._drop(key)
        self._errors.append((key, error))

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self) -> StepResult[EngineOutput]:
        """Drafts one more token for every session that has room, and sends what is ready."""
        ready = self._take_batch()
        if ready:
            self._run(ready)
        busy = any(session.drafter.wants_draft() for session in self._sessions.values())
        return StepResult(self._take_frames(), wait_s=0.0 if busy else None)

    def _take_batch(self) -> list[tuple[_Session, list[int], bool]]:
        """Sessions of this step, the tokens each feeds, and whether they reach its end so that it can draw."""
        batch = []
        budget = self._max_step_tokens
        wanting = [session for session in self._sessions.values() if session.drafter.wants_draft()]
        for session in sorted(wanting, key=lambda session: session.drafter.num_drafted):
            uncached = session.drafter.uncached()
            chunk = uncached[:budget]
            if chunk:
                batch.append((session, chunk, len(chunk) == len(uncached)))
                budget -= len(chunk)
        return batch

    def _run(self, batch: list[tuple[_Session, list[int], bool]]) -> None:
        while batch:
            chunks = [Chunk(session.sequence, tokens, int(draws)) for session, tokens, draws in batch]
            try:
                logits = self._runtime.forward(chunks)
            except OutOfKVBlocks as error:
                session, _, _ = batch.pop()  # the one furthest ahead needs it least
                self._fail(session.key, SessionError(SessionErrorCode.OUT_OF_MEMORY, str(error)))
                continue
            for session, tokens, _ in batch:
                session.drafter.num_cached += len(tokens)
            self._draw(logits, [session for session, _, draws in batch if draws])
            return

    def _draw(self, logits: Tensor, sessions: Sequence[_Session]) -> None:
        if not sessions:
            return
        rows, positions = [], []
        for session in sessions:
            sampling = session.drafter.sampling
            rows.append(SamplingRow(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed))
            positions.append(session.drafter.num_committed + session.drafter.num_drafted)
        draws = draw(logits, rows, positions, limit=self._vocab_size, with_probabilities=True)
        probabilities = draws.probabilities or []
        for session, token_id, probability in zip(sessions, draws.token_ids, probabilities, strict=True):
            session.drafter.drafted(token_id, probability)

    def _take_frames(self) -> list[EngineOutput]:
        """One frame for each connection that has news."""
        items: dict[ConnectionId, list[tuple[SessionId, DraftEvent]]] = {}
        for session in self._sessions.values():
            proposal = session.drafter.take_proposal() if self._is_due(session.drafter) else None
            if proposal is not None:
                items.setdefault(session.key[0], []).append((session.key[1], proposal))
        for (connection, session_id), error in self._errors:
            items.setdefault(connection, []).append((session_id, error))
        self._errors.clear()
        return [(connection, tuple(news)) for connection, news in items.items()]

    def _is_due(self, drafter: DrafterSession) -> bool:
        """The first token after a miss goes at once, the target may be waiting for it; then 1, 2, 4, ... together."""
        return drafter.num_unsent >= min(max(drafter.num_sent, 1), self._flush_tokens) or not drafter.wants_draft()
