"""The drafter on the model thread: one packed batch per step, one more token for every line that is chosen to grow, or
a few where the runtime draws them by itself.

`speculation.draft_schedule` chooses; what a commit made stale is gone before the next step. Every line, the main one
and each branch, has a sequence of its own in the cache: a branch is a fork of the main line's. What is drafted leaves
in frames: at once while the target may be waiting for it, a few tokens together when it is not.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from draft_worker.drawing import LineEnd, draw_guesses
from draft_worker.metrics import DraftMetrics
from grammar import GrammarCompiler, GrammarError, GrammarPath, Mask, PendingPaths
from inference import Chunk, OutOfKVBlocks, Runtime, SamplingRow, SequenceId, SequenceRows, StepResult
from rpc.draft_codec import DraftFrame
from rpc.engine_host import ConnectionId, Hangup, Submitted
from speculation.draft_lines import DraftLine, LineId
from speculation.draft_schedule import DraftEntry, DraftSchedule
from speculation.drafter import CommitMismatch, DrafterSession, take_frame
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
from telemetry.tracing import NO_SPAN, NO_TRACING, Span, Tracing

EngineCommand: TypeAlias = Submitted[DraftCommand] | Hangup
EngineOutput: TypeAlias = tuple[ConnectionId, DraftFrame]
SessionKey: TypeAlias = tuple[ConnectionId, SessionId]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Session:
    key: SessionKey
    drafter: DrafterSession
    rows: SequenceRows
    sequences: dict[LineId, SequenceId]
    path: GrammarPath | None = None
    """Where the answer stands in its grammar; None: anything may be said."""
    span: Span = NO_SPAN

    def follow(self, runtime: Runtime) -> None:
        """After a commit or a pause: the cache loses what the drafter no longer has."""
        for line_id in self.sequences.keys() - self.drafter.line_ids:
            runtime.free(self.sequences.pop(line_id))
        main = self.drafter.main
        if main.num_cached < runtime.length(self.sequences[main.id]):
            runtime.truncate(self.sequences[main.id], main.num_cached)

    @property
    def fixed_row(self) -> SamplingRow | None:
        """How all tokens are drawn, with the target's noise; None if that depends on the tokens before."""
        is_free = self.path is None and not self.drafter.sampling.by_ratio
        return self.rows.fixed if is_free else None

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
        metrics: DraftMetrics | None = None,
        tracing: Tracing = NO_TRACING,
        looks_up: bool = True,
    ) -> None:
        """``vocab_size`` is the tokenizer's size. At most ``flush_tokens`` drafted tokens of a line wait to leave
        together. Without ``grammars`` sessions with a grammar are refused. ``looks_up``: see
        `speculation.prompt_lookup`.
        """
        self._runtime = runtime
        self._vocab_size = vocab_size
        self._schedule: DraftSchedule[_Session] = DraftSchedule(max_step_tokens, looks_up)
        self._flush_tokens = flush_tokens
        self._clock = clock
        self._metrics = metrics or DraftMetrics()
        self._tracing = tracing
        self._sessions: dict[SessionKey, _Session] = {}
        self._errors: list[tuple[SessionKey, SessionError]] = []
        self._paths: PendingPaths[SessionKey] = PendingPaths(grammars)
        self._metrics.watch(lambda: len(self._sessions), lambda: runtime.num_free_tokens)

    # -- commands -----------------------------------------------------------------------------------------------

    def apply(self, commands: Sequence[EngineCommand]) -> None:
        """Brings the sessions up to date with what arrived since the last step."""
        for command in commands:
            if isinstance(command, Hangup):
                for key in [key for key in self._sessions if key[0] == command.connection]:
                    self._drop(key)
            else:
                for session_id, item in command.items:
                    self._apply_item((command.connection, session_id), item, command.arrived_s)

    def _apply_item(self, key: SessionKey, item: DraftCommand, arrived_s: float) -> None:
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
            self._commit(session, item, arrived_s)

    def _open(self, key: SessionKey, command: OpenDraft) -> None:
        error = check_open_draft(command, self._vocab_size, self._runtime.max_context)
        if key in self._sessions:
            error = SessionError(SessionErrorCode.DUPLICATE_SESSION, f"session {key[1]} is open already")
        if error is not None:
            self._fail(key, error)
            return
        drafter = self._schedule.open(command, self._vocab_size, self._runtime.max_context)
        rows = SequenceRows(command.sampling, drafter.prompt_length, command.stop_token_ids, self._vocab_size)
        span = NO_SPAN
        if command.trace_context:
            span = self._tracing.start("draft", command.trace_context, session_id=key[1], lookahead=command.lookahead)
        self._sessions[key] = _Session(key, drafter, rows, {drafter.main.id: self._runtime.open()}, span=span)
        _log.debug("session opened", extra={"session_id": key[1], "num_tokens": len(command.token_ids)})
        self._paths.start(key, command.sampling, command.token_ids)

    def _commit(self, session: _Session, command: Commit, arrived_s: float) -> None:
        try:
            session.drafter.commit(command, arrived_s)
        except CommitMismatch as error:
            self._fail(session.key, SessionError(SessionErrorCode.INVALID, str(error)))
            return
        session.follow(self._runtime)

    def _drop(self, key: SessionKey, error: str = "") -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            session.free(self._runtime)
            self._paths.drop(key)
            session.span.end(error)
            _log.debug("session ended", extra={"session_id": key[1]})

    def _fail(self, key: SessionKey, error: SessionError) -> None:
        self._drop(key, error.code.value)
        self._errors.append((key, error))
        self._metrics.session_failed(error.code)
        _log.info("session failed", extra={"session_id": key[1], "code": error.code.value})

    def _take_paths(self) -> None:
        """Grammars that are compiled now let their sessions begin."""
        for key, path in self._paths.take():
            if isinstance(path, GrammarError):
                self._fail(key, SessionError(SessionErrorCode.INVALID, f"grammar: {path}"))
            else:
                self._sessions[key].path = path

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self, arrived: Callable[[], Sequence[EngineCommand]] = tuple) -> StepResult[EngineOutput]:
        """Lets the lines that are chosen grow, and sends what is ready."""
        self._take_paths()
        sessions = self._paths.without(self._sessions)
        entries = self._schedule.next(sessions)
        start_s = self._clock()
        if entries:
            self._run(entries)
        now_s = self._clock()
        if not self._schedule.has_work(sessions):
            return StepResult(self._take_frames(1, now_s, math.inf))
        next_s = now_s + (now_s - start_s)  # if the next step takes as long
        return StepResult(self._take_frames(self._flush_tokens, now_s, next_s), wait_s=0.0)

    def _run(self, entries: list[DraftEntry[_Session]]) -> None:
        start_s = self._clock()
        while entries:
            try:
                chunks = self._chunks(entries)
                depth = self._draw_chains(entries, chunks)
                num_drafted = depth * len(entries) if depth else self._draw_next(entries, chunks)
            except OutOfKVBlocks as error:
                entries = self._shrink(entries, error)
                continue
            step_s = self._clock() - start_s
            self._schedule.report(entries, step_s, depth or 1)
            num_tokens = sum(len(entry.token_ids) for entry in entries)
            num_branch = sum(entry.draws and entry.line is not entry.session.drafter.main for entry in entries)
            num_branch *= depth or 1
            self._metrics.stepped(len(entries), num_tokens, num_drafted - num_branch, num_branch, step_s)
            return

    def _draw_chains(self, entries: Sequence[DraftEntry[_Session]], chunks: Sequence[Chunk]) -> int:
        """Draws several tokens of each line in a row, and returns how many; 0, with nothing done, if it cannot be."""
        depth = self._schedule.depth(entries)
        if depth == 1:
            return 0
        rows = [row for entry in entries if (row := entry.session.fixed_row) is not None]
        if len(rows) < len(entries):
            return 0
        draws = self._runtime.draw_chains(chunks, rows, depth, limit=self._vocab_size, num_runners_up=NUM_RUNNERS_UP)
        if draws is None:
            return 0
        guesses = map(guess_of, draws.token_ids, draws.runners_up)
        for entry in entries:
            entry.line.num_cached += len(entry.token_ids)
            entry.extend(list(itertools.islice(guesses, depth)))
        return depth

    def _draw_next(self, entries: Sequence[DraftEntry[_Session]], chunks: Sequence[Chunk]) -> int:
        """Draws one token of each line, and behind what was looked up; returns how many tokens that brought."""
        logits = self._runtime.forward(chunks)
        for entry in entries:
            entry.line.num_cached += len(entry.token_ids)
        return self._draw(logits, [entry for entry in entries if entry.draws])

    def _chunks(self, entries: Sequence[DraftEntry[_Session]]) -> list[Chunk]:
        return [
            Chunk(
                entry.session.sequence_of(entry.line, self._runtime),
                [*entry.token_ids, *entry.verified],
                entry.num_draws,
            )
            for entry in entries
        ]

    def _shrink(self, entries: list[DraftEntry[_Session]], error: OutOfKVBlocks) -> list[DraftEntry[_Session]]:
        """What was looked up goes first, then all branches; then the session furthest ahead, which needs it least."""
        if any(entry.num_looked_up for entry in entries):
            return [entry.without_lookup() for entry in entries]
        branches = [(session, line) for session in self._sessions.values() for line in session.drafter.lines[1:]]
        for session, branch in branches:
            session.drafter.give_up(branch)
            session.follow(self._runtime)
        if branches:
            return [entry for entry in entries if entry.line is entry.session.drafter.main]
        *others, furthest = entries
        self._fail(furthest.session.key, SessionError(SessionErrorCode.OUT_OF_MEMORY, str(error)))
        return others

    def _draw(self, logits: Tensor, entries: Sequence[DraftEntry[_Session]]) -> int:
        """Draws what follows the entries; how many tokens that brought."""
        masks, failed = self._masks(entries)
        ends = [
            LineEnd(entry.session.drafter, entry.line, entry.session.rows, mask, entry.verified[:index])
            for entry, mask in zip(entries, masks, strict=True)
            for index in range(entry.num_draws)
        ]
        guesses = iter(draw_guesses(logits, ends, self._vocab_size))
        num_drafted = len(ends)
        for entry in entries:
            num_wrong = entry.conclude(list(itertools.islice(guesses, entry.num_draws)))
            if num_wrong:
                self._runtime.truncate(entry.session.sequences[entry.line.id], entry.line.num_cached)
                num_drafted -= num_wrong
        for key, error in failed.items():
            self._fail(key, SessionError(SessionErrorCode.INVALID, f"grammar: {error}"))
        return num_drafted

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

    def _by_connection(self) -> dict[ConnectionId, list[_Session]]:
        found: dict[ConnectionId, list[_Session]] = {}
        for session in self._sessions.values():
            found.setdefault(session.key[0], []).append(session)
        return found

    def _take_frames(self, flush_tokens: int, now_s: float, next_s: float) -> list[EngineOutput]:
        """One frame for each connection that has news; the next ones are expected to leave at ``next_s``."""
        items: dict[ConnectionId, list[tuple[SessionId, DraftEvent]]] = {}
        for connection, sessions in self._by_connection().items():
            taken = take_frame([session.drafter for session in sessions], flush_tokens, now_s, next_s)
            news: list[tuple[SessionId, DraftEvent]] = [
                (one.key[1], proposal) for one, found in zip(sessions, taken, strict=True) for proposal in found
            ]
            if news:
                items[connection] = news
        for (connection, session_id), error in self._errors:
            items.setdefault(connection, []).append((session_id, error))
        self._errors.clear()
        return [(connection, tuple(news)) for connection, news in items.items()]
