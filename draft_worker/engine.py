"""The drafter on the model thread: one packed batch per step, one more token for every line that is chosen to grow.

`speculation.draft_schedule` chooses; what a commit made stale is gone before the next step. Every line, the main one
and each branch, has a sequence of its own in the cache: a branch is a fork of the main line's. What is drafted leaves
in frames: at once while the target may be waiting for it, a few tokens together when it is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from grammar import GrammarCompiler, GrammarError, GrammarPath, Mask, PendingPaths
from inference import Chunk, OutOfKVBlocks, Runtime, SequenceId, SequenceRows, StepResult, draw
from rpc.codec import DraftFrame
from rpc.engine_host import ConnectionId, Hangup, Submitted
from speculation.draft_lines import DraftLine, LineId
from speculation.draft_schedule import DraftEntry, DraftSchedule
from speculation.drafter import CommitMismatch, DrafterSession
from speculation.guesses import NUM_RUNNERS_UP, guess_of
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
    rows: SequenceRows
    sequences: dict[LineId, SequenceId]
    path: GrammarPath | None = None
    """Where the answer stands in its grammar; None: anything may be said."""

    def follow(self, runtime: Runtime) -> None:
        """After a commit or a pause: the cache loses what the drafter no longer has."""
        for line_id in self.sequences.keys() - self.drafter.line_ids:
            runtime.free(self.sequences.pop(line_id))
        main = self.drafter.main
        if main.num_cached < runtime.length(self.sequences[main.id]):
            runtime.truncate(self.sequences[main.id], main.num_cached)

    def mask(self, line: DraftLine) -> Mask:
        """What may come behind ``line``. Raises `GrammarError`."""
        if self.path is None:
            return None
        self.path.follow(self.drafter.committed)
        return self.path.mask(self.drafter.ahead(line))

    def free(self, runtime: Runtime) -> None:
        for sequence in self.sequences.values():
            runtime.free(sequence)

    def sequence_of(self, line: DraftLine, runtime: Runtime) -> SequenceId:
        """The line's sequence; a new branch forks the main line's. Raises `OutOfKVBlocks`."""
        sequence = self.sequences.get(line.id)
        if sequence is None:
            sequence = self.sequences[line.id] = runtime.fork(self.sequences[self.drafter.main.id])
            runtime.truncate(sequence, line.num_cached)
        return sequence


class DraftEngine:
    """All sessions of one draft worker. Every method runs on the model thread."""

    def __init__(
        self,
        runtime: Runtime,
        vocab_size: int,
        max_step_tokens: int,
        flush_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """``vocab_size`` is the tokenizer's size. At most ``flush_tokens`` drafted tokens of a line wait to leave
        together. Without ``grammars`` sessions with a grammar are refused."""
        self._runtime = runtime
        self._vocab_size = vocab_size
        self._schedule: DraftSchedule[_Session] = DraftSchedule(max_step_tokens)
        self._flush_tokens = flush_tokens
        self._clock = clock
        self._sessions: dict[SessionKey, _Session] = {}
        self._errors: list[tuple[SessionKey, SessionError]] = []
        self._paths: PendingPaths[SessionKey] = PendingPaths(grammars)

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
            session.follow(self._runtime)
        else:
            self._commit(session, item)

    def _open(self, key: SessionKey, command: OpenDraft) -> None:
        error = check_open_draft(command, self._vocab_size, self._runtime.max_context)
        if key in self._sessions:
            error = SessionError(SessionErrorCode.DUPLICATE_SESSION, f"session {key[1]} is open already")
        if error is not None:
            self._fail(key, error)
            return
        drafter = self._schedule.open(command, self._vocab_size, self._runtime.max_context)
        rows = SequenceRows(command.sampling, drafter.prompt_length, command.stop_token_ids, self._vocab_size)
        self._sessions[key] = _Session(key, drafter, rows, {drafter.main.id: self._runtime.open()})
        self._paths.start(key, command.sampling, command.token_ids)

    def _commit(self, session: _Session, command: Commit) -> None:
        try:
            session.drafter.commit(command)
        except CommitMismatch as error:
            self._fail(session.key, SessionError(SessionErrorCode.INVALID, str(error)))
            return
        session.follow(self._runtime)

    def _drop(self, key: SessionKey) -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            session.free(self._runtime)
            self._paths.drop(key)

    def _fail(self, key: SessionKey, error: SessionError) -> None:
        self._drop(key)
        self._errors.append((key, error))

    def _take_paths(self) -> None:
        """Grammars that are compiled now let their sessions begin."""
        for key, path in self._paths.take():
            if isinstance(path, GrammarError):
                self._fail(key, SessionError(SessionErrorCode.INVALID, f"grammar: {path}"))
            else:
                self._sessions[key].path = path

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self) -> StepResult[EngineOutput]:
        """Drafts one more token for the lines that are chosen, and sends what is ready."""
        self._take_paths()
        sessions = self._paths.without(self._sessions)
        entries = self._schedule.next(sessions)
        if entries:
            self._run(entries)
        busy = self._schedule.has_work(sessions)
        return StepResult(self._take_frames(self._flush_tokens if busy else 1), wait_s=0.0 if busy else None)

    def _run(self, entries: list[DraftEntry[_Session]]) -> None:
        start_s = self._clock()
        while entries:
            try:
                logits = self._forward(entries)
            except OutOfKVBlocks as error:
                entries = self._shrink(entries, error)
                continue
            for entry in entries:
                entry.line.num_cached += len(entry.token_ids)
            self._draw(logits, [entry for entry in entries if entry.draws])
            self._schedule.report(entries, self._clock() - start_s)
            return

    def _forward(self, entries: Sequence[DraftEntry[_Session]]) -> Tensor:
        return self._runtime.forward(
            [
                Chunk(entry.session.sequence_of(entry.line, self._runtime), entry.token_ids, int(entry.draws))
                for entry in entries
            ]
        )

    def _shrink(self, entries: list[DraftEntry[_Session]], error: OutOfKVBlocks) -> list[DraftEntry[_Session]]:
        """Branches go first, all that there are; then the session furthest ahead, which needs it least."""
        branches = [(session, line) for session in self._sessions.values() for line in session.drafter.lines[1:]]
        for session, branch in branches:
            session.drafter.give_up(branch)
            session.follow(self._runtime)
        if branches:
            return [entry for entry in entries if entry.line is entry.session.drafter.main]
        *others, furthest = entries
        self._fail(furthest.session.key, SessionError(SessionErrorCode.OUT_OF_MEMORY, str(error)))
        return others

    def _draw(self, logits: Tensor, entries: Sequence[DraftEntry[_Session]]) -> None:
        if not entries:
            return
        masks, failed = self._masks(entries)
        rows, positions = [], []
        for entry, mask in zip(entries, masks, strict=True):
            drafter = entry.session.drafter
            row = entry.session.rows.row(drafter.committed, drafter.ahead(entry.line))
            rows.append(row if mask is None else row.with_allowed(mask))
            positions.append(drafter.position(entry.line))
        draws = draw(logits, rows, positions, limit=self._vocab_size, num_runners_up=NUM_RUNNERS_UP)
        for entry, token_id, runners_up in zip(entries, draws.token_ids, draws.runners_up, strict=True):
            entry.session.drafter.drafted(entry.line, guess_of(token_id, runners_up))
        for key, error in failed.items():
            self._fail(key, SessionError(SessionErrorCode.INVALID, f"grammar: {error}"))

    def _masks(self, entries: Sequence[DraftEntry[_Session]]) -> tuple[list[Mask], dict[SessionKey, GrammarError]]:
        """What the grammars allow at the end of each line, and the sessions whose grammar fails there."""
        masks: list[Mask] = []
        failed: dict[SessionKey, GrammarError] = {}
        for entry in entries:
            try:
                masks.append(entry.session.mask(entry.line))
            except GrammarError as error:
                masks.append(None)
                failed[entry.session.key] = error
        return masks, failed

    def _take_frames(self, flush_tokens: int) -> list[EngineOutput]:
        """One frame for each connection that has news; nothing waits for what will not be drafted."""
        items: dict[ConnectionId, list[tuple[SessionId, DraftEvent]]] = {}
        for session in self._sessions.values():
            for proposal in session.drafter.take_proposals(flush_tokens):
                items.setdefault(session.key[0], []).append((session.key[1], proposal))
        for (connection, session_id), error in self._errors:
            items.setdefault(connection, []).append((session_id, error))
        self._errors.clear()
        return [(connection, tuple(news)) for connection, news in items.items()]
