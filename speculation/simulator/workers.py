"""The two kinds of worker: the real sessions and schedules around a forward pass that only takes time.

As on the model thread, commands that arrive during a step are applied when it is over, and one frame leaves per step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from speculation.draft_schedule import DraftEntry, DraftSchedule
from speculation.drafter import DrafterSession, take_frame
from speculation.gathering import FrameTrip
from speculation.messages import (
    CloseSession,
    Commit,
    DraftCommand,
    DraftEvent,
    Heard,
    OpenDraft,
    OpenTarget,
    Proposal,
    SessionId,
    SetK,
    SetLookahead,
    TargetCommand,
    TargetFrame,
    Verdict,
)
from speculation.simulator.clock import VirtualClock
from speculation.simulator.scenario import Costs, Scenario
from speculation.simulator.tokens import VOCAB_SIZE, TokenProcess
from speculation.step_schedule import NO_OUTLOOK, CachedSession, NextStep, StepEntry, StepSchedule

CommandT = TypeVar("CommandT")
FrameT = TypeVar("FrameT")
StepT = TypeVar("StepT")
DraftFrame: TypeAlias = Sequence[tuple[SessionId, DraftEvent]]
CommandFrame: TypeAlias = tuple[Sequence[tuple[SessionId, CommandT]], Heard]
"""And what the coordinator had had of the worker."""

_ENDLESS = 1 << 40
"""KV positions and context: memory is not modelled."""

_DRAFT_RANK, _TARGET_RANK = 1, 2
"""Of what is due at once: news first, then a draft step, then a verify step."""


@dataclass(frozen=True, slots=True)
class Work:
    """What workers have done."""

    num_steps: int = 0
    num_tokens: int = 0
    """Through the model."""
    busy_s: float = 0.0
    waited_s: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.num_steps + other.num_steps,
            self.num_tokens + other.num_tokens,
            self.busy_s + other.busy_s,
            self.waited_s + other.waited_s,
        )

    def __sub__(self, other: Work) -> Work:
        return self + Work(-other.num_steps, -other.num_tokens, -other.busy_s, -other.waited_s)


class _Worker(ABC, Generic[CommandT, FrameT, StepT]):
    """Inbox, step, outbox."""

    def __init__(self, clock: VirtualClock, costs: Costs, rank: int) -> None:
        self.send: Callable[[FrameT], None]
        """To the coordinator; set when it has connected."""
        self._num_steps = self._num_tokens = 0
        self._busy_s = self._waited_s = 0.0
        self._clock = clock
        self._costs = costs
        self._rank = rank
        self._inbox: list[tuple[float, CommandFrame[CommandT]]] = []
        self._busy = False
        self._num_turns_asked = 0  # only the last one asked for counts

    @property
    def work(self) -> Work:
        """What it has done so far."""
        return Work(self._num_steps, self._num_tokens, self._busy_s, self._waited_s)

    def receive(self, frame: CommandFrame[CommandT]) -> None:
        """A frame from the coordinator arrives."""
        self._inbox.append((self._clock.now_s, frame))
        if not self._busy:
            self._ask_turn(0.0)

    def _ask_turn(self, after_s: float) -> None:
        self._num_turns_asked += 1
        self._clock.at(self._clock.now_s + after_s, partial(self._turn, self._num_turns_asked), rank=self._rank)

    def _turn(self, number: int) -> None:
        if number != self._num_turns_asked or self._busy:
            return
        self._apply_arrived()
        self._begin()

    def _apply_arrived(self) -> None:
        inbox, self._inbox = self._inbox, []
        for arrived_s, (items, heard) in inbox:
            self._hear(len(items), heard, arrived_s)
            for session_id, command in items:
                self._apply(session_id, command, arrived_s)

    def _run(self, step: StepT, num_tokens: int, num_sessions: int) -> None:
        """A forward pass, which `_end` follows."""
        step_s = self._costs.step_s(num_tokens, num_sessions)
        self._num_steps += 1
        self._num_tokens += num_tokens
        self._busy_s += step_s
        self._busy = True
        self._clock.at(self._clock.now_s + step_s, partial(self._finish, step, step_s))

    def _finish(self, step: StepT, step_s: float) -> None:
        self._end(step, step_s)
        self._clock.at(self._clock.now_s + self._costs.overhead_s, self._go_on, rank=self._rank)

    def _go_on(self) -> None:
        self._busy = False
        if self._inbox or self._has_more():
            self._num_turns_asked += 1
            self._turn(self._num_turns_asked)

    @abstractmethod
    def _hear(self, num_commands: int, heard: Heard, arrived_s: float) -> None: ...

    @abstractmethod
    def _apply(self, session_id: SessionId, command: CommandT, arrived_s: float) -> None: ...

    @abstractmethod
    def _begin(self) -> None:
        """Starts a step if there is one."""

    @abstractmethod
    def _end(self, step: StepT, step_s: float) -> None:
        """Draws and sends what the step brought."""

    @abstractmethod
    def _has_more(self) -> bool: ...


class ModelledTarget(_Worker[TargetCommand, TargetFrame, NextStep[CachedSession]]):
    """A target worker."""

    def __init__(self, clock: VirtualClock, scenario: Scenario, tokens: TokenProcess) -> None:
        super().__init__(clock, scenario.target, _TARGET_RANK)
        self._tokens = tokens
        self._schedule: StepSchedule[CachedSession] = StepSchedule(scenario.max_step_tokens)
        self._sessions: dict[SessionId, CachedSession] = {}
        self._trip = FrameTrip()
        self._gathers = scenario.gathers

    def _hear(self, num_commands: int, heard: Heard, arrived_s: float) -> None:
        self._trip.on_heard(num_commands, heard, arrived_s)

    def _apply(self, session_id: SessionId, command: TargetCommand, arrived_s: float) -> None:
        session = self._sessions.get(session_id)
        if isinstance(command, OpenTarget):
            self._sessions[session_id] = CachedSession(session_id, self._schedule.open(command, VOCAB_SIZE))
        elif session is None:
            pass  # it ended while this was on its way
        elif isinstance(command, Proposal):
            session.verifier.stage(command, arrived_s)
        elif isinstance(command, SetK):
            session.verifier.set_k(command.k)
        elif isinstance(command, CloseSession):
            del self._sessions[session_id]

    def _begin(self) -> None:
        step = self._schedule.next(self._sessions.values(), self._clock.now_s, _ENDLESS)
        if step.wait_s > 0.0:
            self._ask_turn(step.wait_s)
        elif step.entries:
            self._waited_s += step.waited_s
            self._run(step, sum(len(entry.token_ids) for entry in step.entries), len(step.entries))

    def _end(self, step: NextStep[CachedSession], step_s: float) -> None:
        report = self._schedule.report(step.entries, step_s, step.waited_s)
        verdicts: list[tuple[CachedSession, Verdict]] = []
        for entry in step.entries:
            entry.session.num_cached += len(entry.token_ids)
            if entry.is_complete:
                verdicts.append((entry.session, self._conclude(entry)))
        self._apply_arrived()
        if verdicts:
            items = [(session.id, session.verifier.brought_up_to_date(verdict)) for session, verdict in verdicts]
            self._trip.on_sent(self._clock.now_s)
            outlook = NO_OUTLOOK
            if self._gathers:
                outlook = self._schedule.outlook(self._sessions.values(), self._clock.now_s)
            gather_s = self._trip.gather_s(outlook.step_s)
            self.send(TargetFrame(tuple(items), report, gather_s, self._trip.num_heard, outlook.drafts_at_once))

    def _conclude(self, entry: StepEntry[CachedSession]) -> Verdict:
        session, verifier = entry.session, entry.session.verifier
        known = verifier.token_ids
        draws = self._tokens.target_draws(verifier.sampling.seed, len(known), known[-1], entry.drafted)
        verdict = verifier.conclude(entry.drafted, draws, self._clock.now_s)
        if verdict.finish_reason is not None:
            del self._sessions[session.id]
        else:
            session.forget_uncommitted()
        return verdict

    def _has_more(self) -> bool:
        return bool(self._sessions)


@dataclass(frozen=True, slots=True)
class _Drafting:
    drafter: DrafterSession
    seed: int


class ModelledDrafter(_Worker[DraftCommand, DraftFrame, list[DraftEntry[_Drafting]]]):
    """A draft worker."""

    def __init__(self, clock: VirtualClock, scenario: Scenario, tokens: TokenProcess) -> None:
        super().__init__(clock, scenario.draft, _DRAFT_RANK)
        self._tokens = tokens
        self._schedule: DraftSchedule[_Drafting] = DraftSchedule(scenario.max_step_tokens)
        self._flush_tokens = scenario.flush_tokens
        self._sessions: dict[SessionId, _Drafting] = {}

    def _hear(self, num_commands: int, heard: Heard, arrived_s: float) -> None:
        pass

    def _apply(self, session_id: SessionId, command: DraftCommand, arrived_s: float) -> None:
        if isinstance(command, OpenDraft):
            drafter = self._schedule.open(command, VOCAB_SIZE, _ENDLESS)
            self._sessions[session_id] = _Drafting(drafter, command.sampling.seed)
        elif isinstance(command, CloseSession):
            self._sessions.pop(session_id, None)
        elif isinstance(command, SetLookahead):
            self._sessions[session_id].drafter.set_lookahead(command.lookahead)
        elif isinstance(command, Commit):
            self._sessions[session_id].drafter.commit(command, arrived_s)

    def _begin(self) -> None:
        step = self._schedule.next(self._sessions.values())
        if step:
            self._run(step, sum(len(entry.token_ids) + entry.num_looked_up for entry in step), len(step))
        else:
            self._send_due()  # a shorter lookahead may have made unsent tokens due

    def _end(self, step: list[DraftEntry[_Drafting]], step_s: float) -> None:
        for entry in step:
            session, line = entry.session, entry.line
            line.num_cached += len(entry.token_ids)
            if entry.draws:
                position = session.drafter.position(line)
                before = (entry.token_ids[-1], *entry.verified)
                entry.conclude([self._tokens.guess(session.seed, position + i, last) for i, last in enumerate(before)])
        self._schedule.report(step, step_s)
        self._send_due(self._clock.now_s + step_s if self._has_more() else math.inf)

    def _send_due(self, next_s: float = math.inf) -> None:
        drafters = [session.drafter for session in self._sessions.values()]
        taken = take_frame(drafters, self._flush_tokens, self._clock.now_s, next_s)
        items: list[tuple[SessionId, DraftEvent]] = [
            (session_id, proposal)
            for session_id, proposals in zip(self._sessions, taken, strict=True)
            for proposal in proposals
        ]
        if items:
            self.send(items)

    def _has_more(self) -> bool:
        return self._schedule.has_work(self._sessions.values())
