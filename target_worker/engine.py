"""The verifier on the model thread: commands in, one step at a time, one frame of verdicts out.

A step, in order:

1. `StepSchedule` says which tokens of which sessions enter, or to wait a moment for drafts;
2. one packed forward pass; if KV memory is short the step shrinks (drafted tokens first, then sessions) and is tried
   again;
3. the target draws its own token at every row, each session commits what agrees, and the cache is rolled back to it.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

from grammar import GrammarCompiler, GrammarError, PendingPaths
from inference import OutOfKVBlocks, Runtime, SequenceRows, StepResult
from rpc.engine_host import ConnectionId, Hangup, Submitted
from speculation.gathering import FrameTrip
from speculation.messages import (
    CloseSession,
    OpenTarget,
    Proposal,
    SessionError,
    SessionErrorCode,
    SessionId,
    SetK,
    StepReport,
    TargetCommand,
    TargetEvent,
    TargetFrame,
    Verdict,
)
from speculation.step_schedule import NO_OUTLOOK, Outlook, StepSchedule
from speculation.validation import check_open_target
from target_worker.forward import Outcome, VerifyForward
from target_worker.metrics import TargetMetrics
from target_worker.sessions import SessionKey, TargetEntry, TargetSession
from telemetry.tracing import NO_SPAN, NO_TRACING, Tracing

EngineCommand: TypeAlias = Submitted[TargetCommand] | Hangup
EngineOutput: TypeAlias = tuple[ConnectionId, TargetFrame]

_log = logging.getLogger(__name__)


class VerifyEngine:
    """All sessions of one target worker. Every method runs on the model thread."""

    def __init__(
        self,
        runtime: Runtime,
        vocab_size: int,
        max_step_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        grammars: GrammarCompiler | None = None,
        metrics: TargetMetrics | None = None,
        tracing: Tracing = NO_TRACING,
        looks_up: bool = True,
    ) -> None:
        """``vocab_size`` is the tokenizer's size; ids beyond it are never drawn nor accepted.

        Without ``grammars`` sessions with a grammar are refused. ``looks_up``: `speculation.prompt_lookup`.
        """
        self._runtime = runtime
        self._metrics = metrics or TargetMetrics()
        self._tracing = tracing
        self._vocab_size = vocab_size
        self._clock = clock
        self._forward = VerifyForward(runtime, vocab_size, self._preempt, self._make_room, self._fail)
        self._schedule: StepSchedule[TargetSession] = StepSchedule(max_step_tokens, looks_up)
        self._sessions: dict[SessionKey, TargetSession] = {}
        self._errors: list[tuple[SessionKey, SessionError]] = []
        self._trips: defaultdict[ConnectionId, FrameTrip] = defaultdict(FrameTrip)
        self._paths: PendingPaths[SessionKey] = PendingPaths(grammars)
        self._metrics.watch(lambda: len(self._sessions), lambda: runtime.num_free_tokens)

    # -- commands -----------------------------------------------------------------------------------------------

    def apply(self, commands: Sequence[EngineCommand]) -> None:
        """Brings the sessions up to date with what arrived since the last step."""
        for command in commands:
            if isinstance(command, Hangup):
                for key in [key for key in self._sessions if key[0] == command.connection]:
                    self._drop(key)
                self._trips.pop(command.connection, None)
            else:
                self._trips[command.connection].on_heard(len(command.items), command.heard, command.arrived_s)
                for session_id, item in command.items:
                    self._apply_item((command.connection, session_id), item, command.arrived_s)

    def _apply_item(self, key: SessionKey, item: TargetCommand, arrived_s: float) -> None:
        session = self._sessions.get(key)
        if isinstance(item, OpenTarget):
            self._open(key, item)
        elif session is None:
            pass  # it ended while this was on its way
        elif isinstance(item, Proposal):
            self._metrics.proposal(session.verifier.stage(item, arrived_s))
        elif isinstance(item, SetK):
            session.verifier.set_k(item.k)
        elif isinstance(item, CloseSession):
            self._drop(key)

    def _open(self, key: SessionKey, command: OpenTarget) -> None:
        error = check_open_target(command, self._vocab_size, self._runtime.max_context)
        if key in self._sessions:
            error = SessionError(SessionErrorCode.DUPLICATE_SESSION, f"session {key[1]} is open already")
        if error is not None:
            self._fail(key, error)
            return
        verifier, sequence = self._schedule.open(command, self._vocab_size), self._runtime.open()
        rows = SequenceRows(verifier.sampling, verifier.prompt_length, command.stop_token_ids, self._vocab_size)
        span = NO_SPAN
        if command.trace_context:
            span = self._tracing.start("verify", command.trace_context, session_id=key[1], k=command.k)
        session = TargetSession(SessionId(sequence), verifier, key=key, sequence=sequence, rows=rows, span=span)
        parent = self._sessions.get((key[0], command.fork_of)) if command.fork_of else None
        self._sessions[key] = session
        _log.debug("session opened", extra={"session_id": key[1], "num_tokens": len(command.token_ids)})
        self._paths.start(key, command.sampling, command.token_ids)
        if parent is not None and command.prompt_logprobs is None and session.can_share_with(parent):
            session.waits_for = parent.key
            self._share(parent)

    def _share(self, parent: TargetSession) -> None:
        """Those who wait for ``parent`` get what it has computed, once that is enough."""
        for session in self._sessions.values():
            if session.waits_for == parent.key and session.num_shareable <= parent.num_cached:
                session.waits_for = None
                with suppress(OutOfKVBlocks):  # computed as ever, when there is room
                    session.fork(parent, self._runtime)

    def _drop(self, key: SessionKey, error: str = "") -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            self._runtime.free(session.sequence)
            self._paths.drop(key)
            session.span.end(error)
            _log.debug("session ended", extra={"session_id": key[1]})
            self._let_one_go_first([other for other in self._sessions.values() if other.waits_for == key])

    def _let_one_go_first(self, orphans: Sequence[TargetSession]) -> None:
        """Whom these waited for is gone; the first takes its place."""
        for index, orphan in enumerate(orphans):
            orphan.waits_for = orphans[0].key if index else None

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

    def _make_room(self, key: SessionKey) -> bool:
        """Preempts the youngest session but ``key`` that holds memory; False if there is none."""
        for session in reversed(self._sessions.values()):
            if session.key != key and session.num_cached:
                self._preempt(session)
                return True
        return False

    def _preempt(self, session: TargetSession) -> None:
        session.preempt(self._runtime)
        self._metrics.preempted()

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self, arrived: Callable[[], Sequence[EngineCommand]] = tuple) -> StepResult[EngineOutput]:
        """Runs one verify step over everything that is ready, or says how long to wait for drafts.

        What has ``arrived`` meanwhile is applied before the frame leaves: it then tells of drafts that were on their
        way, and how long commands may gather is known from what the next step will take.
        """
        self._take_paths()
        sessions = self._ready_sessions()
        step = self._schedule.next(sessions, self._clock(), self._runtime.num_free_tokens)
        if step.wait_s > 0:
            return StepResult(self._take_frames([]), wait_s=step.wait_s)
        frames = self._run(step.entries, step.waited_s, arrived) if step.entries else self._take_frames([])
        return StepResult(frames, wait_s=0.0 if sessions else None)

    def _ready_sessions(self) -> list[TargetSession]:
        return [session for session in self._paths.without(self._sessions) if session.waits_for is None]

    def _run(
        self, entries: list[TargetEntry], waited_s: float, arrived: Callable[[], Sequence[EngineCommand]]
    ) -> list[EngineOutput]:
        start_s = self._clock()
        entries, outcomes = self._forward.run(entries)
        now_s = self._clock()
        if not entries:
            return self._take_frames([])
        report = self._schedule.report(entries, now_s - start_s, waited_s)
        if any(session.waits_for is not None for session in self._sessions.values()):
            for entry in entries:
                self._share(entry.session)
        self._metrics.stepped(entries, report.step_s, waited_s)
        verdicts = [
            (entry.session, self._conclude(entry, outcome, now_s))
            for entry, outcome in zip(entries, outcomes, strict=True)
            if entry.is_complete
        ]
        self.apply(arrived())
        told = [
            (session.key, session.verifier.brought_up_to_date(verdict))
            for session, verdict in verdicts
            if session.key[0] in self._trips  # else its coordinator has just left
        ]
        return self._take_frames(told, report, self._schedule.outlook(self._ready_sessions(), now_s))

    def _conclude(self, entry: TargetEntry, outcome: Outcome, now_s: float) -> Verdict:
        session = entry.session
        verdict = session.verifier.conclude(entry.drafted, outcome.draws, now_s)
        if session.span.is_recording:
            num_tokens, num_drafted = len(verdict.token_ids), verdict.num_drafted
            session.span.event(
                "verdict", num_tokens=num_tokens, num_drafted=num_drafted, num_accepted=verdict.num_accepted
            )
        if outcome.logprobs or session.prompt_logprobs:
            verdict = _with_logprobs(verdict, outcome, session)
        if verdict.finish_reason is not None:
            self._drop(session.key)
        else:
            session.roll_back(self._runtime)
        return verdict

    def _take_frames(
        self,
        verdicts: Sequence[tuple[SessionKey, TargetEvent]],
        report: StepReport | None = None,
        outlook: Outlook = NO_OUTLOOK,
    ) -> list[EngineOutput]:
        """One frame for each connection that has news; commands may gather for the next step if that is known."""
        items: dict[ConnectionId, list[tuple[SessionId, TargetEvent]]] = {}
        for (connection, session_id), event in [*verdicts, *self._errors]:
            items.setdefault(connection, []).append((session_id, event))
        self._errors.clear()
        return [(connection, self._frame(connection, news, report, outlook)) for connection, news in items.items()]

    def _frame(
        self,
        connection: ConnectionId,
        news: Sequence[tuple[SessionId, TargetEvent]],
        report: StepReport | None,
        outlook: Outlook,
    ) -> TargetFrame:
        trip = self._trips[connection]
        trip.on_sent(self._clock())
        gather_s = trip.gather_s(outlook.step_s)
        return TargetFrame(tuple(news), report, gather_s, trip.num_heard, outlook.drafts_at_once)


def _with_logprobs(verdict: Verdict, outcome: Outcome, session: TargetSession) -> Verdict:
    """The prompt's leave with the first verdict, and are forgotten."""
    prompt_logprobs, session.prompt_logprobs = tuple(session.prompt_logprobs), []
    logprobs = tuple(outcome.logprobs[: len(verdict.token_ids)])
    return replace(verdict, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
