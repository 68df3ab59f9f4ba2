"""The verifier on the model thread: commands in, one step at a time, one frame of verdicts out.

A step, in order:

1. the planner says how many staged tokens of each session enter, or to wait a moment for drafts;
2. waiting prefills fill what is left of the step's token budget;
3. one packed forward pass; if KV memory is short the step shrinks (drafted tokens first, then sessions) and is tried
   again;
4. the target draws its own token at every row, each session commits what agrees, and the cache is rolled back to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from inference import Runtime, StepResult
from rpc.engine_host import ConnectionId, Hangup, Submitted
from speculation.acceptance import DEPLOYMENT_WINDOW_STEPS, AcceptanceProfile
from speculation.cost import DraftPace, StepCostModel
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
from speculation.planner import Candidate, StepPlan, StepPlanner
from speculation.validation import check_open_target
from speculation.verifier import VerifierSession
from target_worker.forward import VerifyForward
from target_worker.sessions import SessionKey, StepEntry, TargetSession

EngineCommand: TypeAlias = Submitted[TargetCommand] | Hangup
EngineOutput: TypeAlias = tuple[ConnectionId, TargetFrame]


class VerifyEngine:
    """All sessions of one target worker. Every method runs on the model thread."""

    def __init__(
        self,
        runtime: Runtime,
        vocab_size: int,
        max_step_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``vocab_size`` is the tokenizer's size; ids beyond it are never drawn nor accepted."""
        self._runtime = runtime
        self._vocab_size = vocab_size
        self._max_step_tokens = max_step_tokens
        self._clock = clock
        self._forward = VerifyForward(runtime, vocab_size, self._make_room, self._fail)
        self._costs = StepCostModel()
        self._planner = StepPlanner(self._costs, max_step_tokens)
        self._profile = AcceptanceProfile(window_steps=DEPLOYMENT_WINDOW_STEPS)
        self._pace = DraftPace()
        self._sessions: dict[SessionKey, TargetSession] = {}
        self._errors: list[tuple[SessionKey, SessionError]] = []
        self._waiting_since: float | None = None

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

    def _apply_item(self, key: SessionKey, item: TargetCommand, arrived_s: float) -> None:
        session = self._sessions.get(key)
        if isinstance(item, OpenTarget):
            self._open(key, item)
        elif session is None:
            pass  # it ended while this was on its way
        elif isinstance(item, Proposal):
            session.verifier.stage(item, arrived_s)
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
        verifier = VerifierSession(command, self._vocab_size, self._profile, self._pace)
        self._sessions[key] = TargetSession(key, verifier, self._runtime.open())

    def _drop(self, key: SessionKey) -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            self._runtime.free(session.sequence)

    def _fail(self, key: SessionKey, error: SessionError) -> None:
        self._drop(key)
        self._errors.append((key, error))

    def _make_room(self, key: SessionKey) -> bool:
        """Preempts the youngest session but ``key`` that holds memory; False if there is none."""
        for session in reversed(self._sessions.values()):
            if session.key != key and session.num_cached:
                session.preempt(self._runtime)
                return True
        return False

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self) -> StepResult[EngineOutput]:
        """Runs one verify step over everything that is ready, or says how long to wait for drafts."""
        now_s = self._clock()
        plan, prefilling = self._plan(now_s)
        if plan.wait_s > 0:
            self._waiting_since = self._waiting_since or now_s
            return StepResult(self._take_frames([], None), wait_s=plan.wait_s)
        waited_s = now_s - self._waiting_since if self._waiting_since is not None else 0.0
        self._waiting_since = None
        entries = self._entries(plan, prefilling)
        verdicts, report = self._run(entries, waited_s) if entries else ([], None)
        return StepResult(self._take_frames(verdicts, report), wait_s=0.0 if self._sessions else None)

    def _plan(self, now_s: float) -> tuple[StepPlan, list[TargetSession]]:
        decoding = [session for session in self._sessions.values() if session.is_decoding]
        prefilling = [session for session in self._sessions.values() if not session.is_decoding]
        num_prefill_tokens = min(sum(session.num_uncached for session in prefilling), self._max_step_tokens)
        waited_s = now_s - self._waiting_since if self._waiting_since is not None else 0.0
        candidates = [self._candidate(session) for session in decoding]
        return self._planner.plan(candidates, now_s, waited_s, num_prefill_tokens), prefilling

    def _candidate(self, session: TargetSession) -> Candidate:
        verifier = session.verifier
        return Candidate(
            session_id=SessionId(session.sequence),
            num_staged=verifier.num_staged,
            k=verifier.k,
            survival=verifier.profile.survival(verifier.k),
            pace=verifier.pace if verifier.k else None,
            turn=verifier.turn,
        )

    def _entries(self, plan: StepPlan, prefilling: Sequence[TargetSession]) -> list[StepEntry]:
        entries = []
        budget = self._max_step_tokens
        for session in self._sessions.values():
            num_drafted = plan.num_drafted.get(SessionId(session.sequence))
            if num_drafted is not None:
                entries.append(session.decode_entry(num_drafted))
                budget -= len(entries[-1].token_ids)
        for session in prefilling:
            if budget <= 0:
                break
            if self._has_memory_for(session, entries):
                entries.append(session.prefill_entry(budget))
                budget -= len(entries[-1].token_ids)
        return entries

    def _has_memory_for(self, session: TargetSession, entries: Sequence[StepEntry]) -> bool:
        """A prefill that cannot end well must not push out sessions that run; alone, it is tried in any case."""
        return not entries or session.num_uncached + self._max_step_tokens // 4 <= self._runtime.num_free_tokens

    def _run(
        self, entries: list[StepEntry], waited_s: float
    ) -> tuple[list[tuple[SessionKey, TargetEvent]], StepReport | None]:
        start_s = self._clock()
        entries, draws = self._forward.run(entries)
        now_s = self._clock()
        if not entries:
            return [], None
        num_tokens = sum(len(entry.token_ids) for entry in entries)
        report = StepReport(now_s - start_s, len(entries), num_tokens, waited_s)
        self._costs.observe(report)
        verdicts: list[tuple[SessionKey, TargetEvent]] = []
        for entry, session_draws in zip(entries, draws, strict=True):
            if entry.is_complete:
                verdicts.append((entry.session.key, self._conclude(entry, session_draws, now_s)))
        return verdicts, report

    def _conclude(self, entry: StepEntry, draws: Sequence[int], now_s: float) -> Verdict:
        session = entry.session
        verdict = session.verifier.conclude(entry.drafted, draws, now_s)
        if verdict.finish_reason is not None:
            self._drop(session.key)
        else:
            session.roll_back(self._runtime)
        return verdict

    def _take_frames(
        self, verdicts: Sequence[tuple[SessionKey, TargetEvent]], report: StepReport | None
    ) -> list[EngineOutput]:
        """One frame for each connection that has news."""
        items: dict[ConnectionId, list[tuple[SessionId, TargetEvent]]] = {}
        for (connection, session_id), event in [*verdicts, *self._errors]:
            items.setdefault(connection, []).append((session_id, event))
        self._errors.clear()
        return [(connection, TargetFrame(tuple(news), report)) for connection, news in items.items()]
