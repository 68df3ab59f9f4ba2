"""One request under way: where it is placed, and what its client has yet to read.

All decisions are `speculation.relay.RelaySession`'s; this carries out its actions. Nothing here blocks or runs a task:
links and placement call in; the request's own generator waits until something has changed, and takes it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from coordinator.arms import Arm
from coordinator.links import WorkerLink
from coordinator.meters import SessionMeter
from coordinator.requests import Job
from coordinator.step_trace import StepTraces
from coordinator.structured_output import FIELD as STRUCTURED_OUTPUT
from rpc.draft_codec import DraftFrame
from rpc.errors import Cancelled, FieldViolation, InvalidRequest, OutriderError, Overloaded, SessionFailed, SlowReader
from speculation.adaptive_k import Load
from speculation.messages import (
    DraftCommand,
    DraftEvent,
    FinishReason,
    Proposal,
    SessionErrorCode,
    SessionId,
    StepReport,
    TargetCommand,
    TargetEvent,
    TargetFrame,
    TokenLogprobs,
    Verdict,
)
from speculation.relay import Action, Emit, Fail, Finish, RelaySession, ToDraft, ToTarget
from speculation.session_stats import SessionStats
from telemetry.tracing import NO_SPAN, Span

TargetLink: TypeAlias = "WorkerLink[TargetCommand, TargetFrame, Session]"
DraftLink: TypeAlias = "WorkerLink[DraftCommand, DraftFrame, Session]"


class Session:
    """A job, its relay once it is placed, and its unread output."""

    def __init__(
        self,
        session_id: SessionId,
        job: Job,
        arrived_s: float,
        max_unread: int,
        on_over: Callable[[Session], None],
        changed: asyncio.Event,
        parent: Session | None = None,
        *,
        arm: Arm = Arm.SPECULATIVE,
        meter: SessionMeter | None = None,
        span: Span = NO_SPAN,
    ) -> None:
        """``on_over`` is called once, when the session holds no worker any more. Times are ``time.monotonic()``.

        ``changed`` is set when there is something to read; choices of one request share it. ``parent`` is the first
        of them, whose prompt the others share. The session ends its ``span``.
        """
        self.id = session_id
        self.job = job
        self.parent = parent
        self.arm = arm
        self.meter = meter or SessionMeter()
        self.span = span
        self.target_name = self.draft_name = ""
        """The last worker of each kind that it had."""
        self.num_beside = 1
        """Sessions that the target had at the last verdict, this one included."""
        self.target: TargetLink | None = None
        self.draft: DraftLink | None = None
        self.give_up: asyncio.TimerHandle | None = None
        """Runs while the session waits for a target."""
        self.arrived_s = arrived_s
        self.placed_s = 0.0
        self.first_token_s = 0.0
        self.over_s = 0.0
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.traces = StepTraces(arrived_s, len(job.prompt_token_ids)) if job.traces else None
        self._on_over = on_over
        self._relay: RelaySession | None = None
        self._is_over = False
        self._error: OutriderError | None = None
        self._unread: deque[Emit] = deque()
        self._max_unread = max_unread
        self._changed = changed

    # -- state ------------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Finished, failed or cancelled: it holds no worker, and nothing more will be emitted."""
        return self._is_over

    @property
    def was_placed(self) -> bool:
        """It has had a target; from now on it is replayed rather than started."""
        return self._relay is not None

    @property
    def wants_draft(self) -> bool:
        return self.job.policy is not None and self.draft is None and self.target is not None

    @property
    def stats(self) -> SessionStats:
        return SessionStats() if self._relay is None else self._relay.stats

    @property
    def outcome(self) -> str:
        """Of a session that is over: "stop", "length", or the reason of the error that ended it."""
        if self.finish_reason is not None:
            return self.finish_reason.value
        return (self._error or Cancelled).reason

    # -- placement --------------------------------------------------------------------------------------------------

    def start(self, relay: RelaySession) -> None:
        """The relay is made when the first target is known, whose costs its policy uses."""
        self._relay = relay
        self.placed_s = time.monotonic()
        self._changed.set()

    def attach_target(self, link: TargetLink) -> None:
        self.target, self.target_name = link, link.name
        link.sessions[self.id] = self
        self._perform(self.relay.on_target_up(time.monotonic()))

    def on_target_lost(self) -> None:
        self.target = None
        self._perform(self.relay.on_target_lost(time.monotonic()))

    def attach_draft(self, link: DraftLink) -> None:
        self.draft, self.draft_name = link, link.name
        link.sessions[self.id] = self
        self._perform(self.relay.on_draft_up(time.monotonic(), link.trip))

    def on_draft_lost(self) -> None:
        self.draft = None
        self.meter.on_drafter_lost()
        self._perform(self.relay.on_draft_lost(time.monotonic()))

    # -- events from the workers ------------------------------------------------------------------------------------

    def on_target_event(
        self,
        event: TargetEvent,
        load: Load,
        now_s: float,
        report: StepReport | None = None,
        wanted_in_s: float = 0.0,
    ) -> None:
        """``report`` is that of the step behind the event; in ``wanted_in_s`` drafts should be here (`Outbox`)."""
        self.num_beside = load.num_sessions
        if isinstance(event, Verdict):
            self.meter.on_verdict(event, now_s)
        actions = self.relay.on_target_event(event, load, now_s, wanted_in_s)
        if self.traces is not None and isinstance(event, Verdict) and actions:  # none: it came too late
            self.traces.on_verdict(event, report, now_s)
        self._perform(actions)

    def on_draft_event(self, event: DraftEvent, now_s: float) -> None:
        """After an error the drafter has dropped the session; it goes on plainly until a drafter connects anew."""
        if isinstance(event, Proposal):
            self.meter.on_proposal(event, now_s)
            if self.traces is not None:
                self.traces.on_proposal(event, now_s)
        elif self.draft is not None:
            self.draft.sessions.pop(self.id, None)
            self.draft = None
            self.meter.on_drafter_lost()
        self._perform(self.relay.on_draft_event(event, now_s))

    @property
    def relay(self) -> RelaySession:
        assert self._relay is not None, "the session has not been placed"
        return self._relay

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, ToTarget):
                if self.target is not None:
                    self.target.send(self.id, action.command)
            elif isinstance(action, ToDraft):
                if self.draft is not None:
                    self.draft.send(self.id, action.command)
                    if self.target is not None:
                        self.target.on_told_drafter(self.id, action.command)
            elif isinstance(action, Emit):
                self._unread.append(action)
                self.prompt_logprobs = self.prompt_logprobs or action.prompt_logprobs
                self._changed.set()
                self.first_token_s = self.first_token_s or time.monotonic()
                if self.span.is_recording:
                    _record(action, self.span)
            elif isinstance(action, Finish):
                self.finish_reason = action.reason
            else:
                self._error = _error_of(action)
        if self._relay is not None and self._relay.is_over:
            self._end()
        elif len(self._unread) > self._max_unread:
            self.fail(
                SlowReader(f"{len(self._unread)} events are unread; read faster, or ask for fewer tokens at once")
            )

    # -- ending -----------------------------------------------------------------------------------------------------

    def fail(self, error: OutriderError) -> None:
        """Ends the session on all workers; its reader gets what was emitted before, then the error."""
        if not self._is_over:
            self._error = error
            self.cancel()

    def cancel(self) -> None:
        """Ends the session on all workers at once. Idempotent."""
        if self._is_over:
            return
        if self._relay is not None:
            self._perform(self._relay.cancel(time.monotonic()))
        self._end()

    def stop(self) -> None:
        """Its reader has found the end of the answer in what was emitted; what else there is does not matter."""
        self.finish_reason, self._error = FinishReason.STOP, None
        self._unread.clear()
        self.cancel()

    def _end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self.over_s = time.monotonic()
        for link in (self.target, self.draft):
            if link is not None:
                link.sessions.pop(self.id, None)
        self.target = self.draft = None
        self._changed.set()
        self._end_span()
        self._on_over(self)

    def _end_span(self) -> None:
        if self.span.is_recording:
            self.span.set(
                outcome=self.outcome,
                num_tokens=self.stats.num_committed,
                num_steps=self.stats.num_steps,
                num_drafted=self.stats.num_drafted,
                num_accepted=self.stats.num_accepted,
                num_looked_up=self.stats.num_looked_up,
                num_looked_up_accepted=self.stats.num_looked_up_accepted,
            )
        self.span.end("" if self.finish_reason is not None else self.outcome)

    # -- the client's side ------------------------------------------------------------------------------------------

    async def wait_placed(self) -> None:
        """Returns when the session has a target for the first time; raises the error that it failed with instead."""
        while self._relay is None and not self._is_over:
            self._changed.clear()
            await self._changed.wait()
        if self._relay is None and self._error is not None:
            raise self._error

    async def wait_first_token(self) -> None:
        """Returns when something was emitted, or nothing will be."""
        while not self._unread and not self._is_over:
            self._changed.clear()
            await self._changed.wait()

    @property
    def is_read(self) -> bool:
        """The session has ended well, and all that it emitted has been taken."""
        return self._is_over and not self._unread and self._error is None

    def take(self) -> list[Emit]:
        """What was emitted since, perhaps nothing. Raises the error the session failed with, when all else is taken."""
        if not self._unread and self._error is not None:
            raise self._error
        emitted = list(self._unread)
        self._unread.clear()
        return emitted


def _record(emit: Emit, span: Span) -> None:
    span.event(
        "verdict",
        num_tokens=len(emit.token_ids),
        num_drafted=emit.num_drafted,
        num_accepted=emit.num_accepted,
        num_looked_up=emit.num_looked_up,
        num_looked_up_accepted=emit.num_looked_up_accepted,
        k=emit.k,
    )


def _error_of(failure: Fail) -> OutriderError:
    code, message = failure.error.code, failure.error.message
    if code is SessionErrorCode.OUT_OF_MEMORY:
        return Overloaded(message)
    if code is SessionErrorCode.INVALID:
        field = STRUCTURED_OUTPUT if message.startswith("grammar: ") else "request"
        return InvalidRequest(FieldViolation(field, message))
    return SessionFailed(f"the target worker gave up this request ({code.value}): {message}; try again")
