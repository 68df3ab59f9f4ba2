"""What a coordinator says to one worker, gathered into one frame for each of the worker's steps.

A target looks at commands only between two steps, and every frame that arrives meanwhile interrupts the step. So what
is said while a step runs leaves together, just in time for its end: the target says with each frame how long that is
(`speculation.gathering`). What comes later than that has missed the step, and leaves in time for the one after it.
Drafts that were told to gather are what there is to wait for: when those of all sessions are here, everything leaves.

Each step pays for one frame, and one that was not sent may be later: while commands gather, no more frames leave than
steps begin. A second one for the same step would bring what was late for the first, but interrupt the step once more.
Only a session that begins or ends is worth that: to miss a step costs the one its whole time, and the other is in it
for nobody.

At once leaves what there is no reason to hold: the target is idle or may be waiting for drafts. The step that begins
with an `OpenTarget` then is as good as told: who else begins meanwhile goes along.
"""

from __future__ import annotations

import math
from typing import Generic, TypeVar

from speculation.cost import StepCostModel
from speculation.gathering import MARGIN, MAX_GATHER_S, Departure
from speculation.messages import CloseSession, Commit, DraftCommand, OpenTarget, Proposal, SessionId, TargetFrame

MAX_CREDIT = 2
"""Frames that may leave for one step where none left for the one before."""

OVER = 3.0
"""Times the expected length of a step, or that of the last one, after which it is believed to be over although nobody
said so: a target sends no frame for a step without verdicts."""

CommandT = TypeVar("CommandT")


class Outbox(Generic[CommandT]):
    """Decides when what is said to a worker leaves. A draft worker, which tells nothing, is told everything at once."""

    def __init__(self, costs: StepCostModel | None = None) -> None:
        """``costs``: of the target's steps."""
        self._costs = costs
        self._departure = Departure()
        self._pending: list[tuple[SessionId, CommandT]] = []
        self._credit = MAX_CREDIT  # frames that may leave while commands gather, until the target's next one
        self._has_left = False  # what gathered since the worker's last frame, when it was due
        self._has_missed = False  # there was something that was not due when the last frame came: the step was short
        self._has_urgent = False  # a session begins or ends
        self._held_since_s = 0.0  # when the oldest thing that has not left was said
        self._over_s = 0.0  # when the target's step is over at last
        self._drafts_at_once = False  # drafters are not to gather, whatever commands do
        self._most_tokens = 0  # of a step so far: no prefill is believed to take more at a time
        self._awaited: dict[SessionId, int] = {}  # whose drafts gather, and how many tokens those know as committed
        self._is_complete = False  # all of those are here
        self._num_said = 0
        self._opening_s = 0.0  # the step with the prefills of sessions that were opened when so many commands ...
        self._num_opening = 0  # ... had been said

    def on_frame(self, frame: TargetFrame, now_s: float) -> None:
        """A frame of the target came, and says how long to gather.

        Where it knew of fewer commands than were said, the step that begins now has more prefills.
        """
        if frame.step is not None:
            self._most_tokens = max(self._most_tokens, frame.step.num_tokens)
            self._credit = min(self._credit + 1, MAX_CREDIT)
        if not 0 < frame.num_heard < self._num_opening:
            self._opening_s = 0.0
        self._has_missed = bool(self._pending) and not self._has_left and self._credit == MAX_CREDIT
        self._has_left = False
        self._drafts_at_once = frame.drafts_at_once
        self._awaited.clear()
        self._is_complete = False
        gather_s = max(self._opening_s, frame.gather_s)  # in this order NaN is none
        self._departure.on_news(gather_s, now_s)
        longest_s = max(gather_s, frame.step.step_s) if frame.step is not None else gather_s
        self._over_s = now_s + OVER * min(longest_s, MAX_GATHER_S)

    def on_told_drafter(self, session_id: SessionId, command: DraftCommand) -> None:
        """A drafter was told something after the target's last frame: perhaps to gather the session's drafts."""
        if isinstance(command, Commit) and command.gather_s > 0.0:
            self._awaited[session_id] = command.start + len(command.token_ids)

    def put(self, session_id: SessionId, command: CommandT, now_s: float) -> None:
        """Say something; `due_s` may have changed."""
        if not self._pending:
            self._held_since_s = now_s
        self._pending.append((session_id, command))
        self._has_urgent |= isinstance(command, OpenTarget | CloseSession)
        if isinstance(command, Proposal) and command.num_committed >= self._awaited.get(session_id, math.inf):
            del self._awaited[session_id]
            self._is_complete = not self._awaited

    @property
    def is_empty(self) -> bool:
        return not self._pending

    @property
    def is_complete(self) -> bool:
        """All drafts that were awaited have come, and a frame is left for them: what there is leaves at once."""
        return self._is_complete and self._credit > 0

    def due_s(self, now_s: float) -> float:
        """When what there is leaves; no later than ``now_s``: at once. Nothing is held for more than `MAX_GATHER_S`."""
        if self._has_missed or self.is_complete or not self._departure.gathers:
            return now_s
        due_s = self._departure.due_s(now_s) if self._credit else self._over_s
        if self._has_urgent:
            due_s = min(due_s, self._departure.due_first_s(now_s))
        return min(due_s, self._held_since_s + MAX_GATHER_S)

    def wanted_in_s(self, now_s: float) -> float:
        """Seconds in which drafts should be here, as they leave then; 0: as soon as there are any."""
        return 0.0 if self._drafts_at_once else max(0.0, self._departure.due_s(now_s) - now_s)

    def take(self, now_s: float) -> list[tuple[SessionId, CommandT]]:
        """Everything, in order; it leaves now."""
        items, self._pending = self._pending, []
        self._is_complete = self._has_urgent = False
        if now_s >= self._over_s:
            self._departure.forget()  # whatever was said of that step
        self._num_said += len(items)
        has_missed, self._has_missed = self._has_missed, False
        if opening_s := self._gather_for(items):
            self._opening_s, self._num_opening = max(self._opening_s, opening_s), self._num_said
        if not self._departure.gathers:
            self._departure.gather_for(opening_s, now_s)
            self._over_s = now_s + OVER * opening_s
            return items
        self._credit = max(0, self._credit - 1)
        if not has_missed:  # else there is time for others before the step is over
            self._departure.on_left(now_s)
            self._has_left = True
        return items

    def _gather_for(self, items: list[tuple[SessionId, CommandT]]) -> float:
        """How long to gather during the step that prefills the sessions opened by ``items``; 0: none, or unknown."""
        lengths = [len(command.token_ids) for _, command in items if isinstance(command, OpenTarget)]
        if not lengths or self._costs is None:
            return 0.0
        step_s = self._costs.step_s(min(sum(lengths), self._most_tokens), len(lengths))
        return 0.0 if step_s is None else (1.0 - MARGIN) * step_s
