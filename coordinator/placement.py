"""Which session runs where: bounded admission, the least loaded pair, and what happens when workers come and go.

A session waits in one of two queues until a target has room: sessions that lost their target first, then new requests
in order of arrival. Drafters need no queue: a session without one decodes plainly and gets one when one is there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from coordinator.session import DraftLink, Session, TargetLink
from coordinator.settings import CoordinatorSettings
from rpc.errors import OutriderError, Overloaded, Unavailable
from speculation.relay import RelaySession

MakeRelay: TypeAlias = "Callable[[Session, TargetLink, DraftLink | None], RelaySession]"

MIN_RETRY_S, MAX_RETRY_S = 0.5, 30.0


class Placement:
    """Places sessions on the links that are up."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        targets: Sequence[TargetLink],
        drafts: Sequence[DraftLink],
        make_relay: MakeRelay,
    ) -> None:
        self._settings = settings
        self._targets = targets
        self._drafts = drafts
        self._make_relay = make_relay
        self._displaced: deque[Session] = deque()
        self._waiting: deque[Session] = deque()
        self._typical_session_s = 1.0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._displaced)

    # -- sessions come and go ---------------------------------------------------------------------------------------

    def admit(self, session: Session) -> None:
        """Places the session, or lets it wait. Raises `Overloaded` if too many wait already."""
        if len(self._waiting) >= self._settings.max_queue and self._best_target() is None:
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting, at most {self._settings.max_queue} may; try again later",
                self._retry_after_s(),
            )
        self._waiting.append(session)
        self._fill()
        if not session.was_placed:
            self._limit_wait(session)

    def release(self, session: Session) -> None:
        """The session is over: it waits no longer, and its place is free."""
        if session.give_up is not None:
            session.give_up.cancel()
            for queue in (self._waiting, self._displaced):
                if session in queue:
                    queue.remove(session)
        if session.was_placed:
            self._typical_session_s += 0.1 * (session.over_s - session.placed_s - self._typical_session_s)
        self._fill()

    def _limit_wait(self, session: Session) -> None:
        if any(link.is_up for link in self._targets):
            delay_s, make_error = self._settings.queue_timeout_s, self._queue_error
        else:
            delay_s, make_error = self._settings.target_wait_s, self._no_target_error
        session.give_up = asyncio.get_running_loop().call_later(delay_s, lambda: session.fail(make_error()))

    def _queue_error(self) -> OutriderError:
        waited_s = self._settings.queue_timeout_s
        return Overloaded(f"no place became free within {waited_s:g} s; try again later", self._retry_after_s())

    def _no_target_error(self) -> OutriderError:
        problems = "; ".join(f"{link.name}: {link.problem or 'lost'}" for link in self._targets)
        return Unavailable(f"no target worker came up within {self._settings.target_wait_s:g} s ({problems})")

    def _retry_after_s(self) -> float:
        num_places = self._settings.max_sessions * max(1, sum(link.is_up for link in self._targets))
        expected_s = self._typical_session_s * (self.num_waiting + 1) / num_places
        return min(max(expected_s, MIN_RETRY_S), MAX_RETRY_S)

    # -- workers come and go ----------------------------------------------------------------------------------------

    def on_target_up(self) -> None:
        self._fill()

    def on_target_lost(self, sessions: Sequence[Session]) -> None:
        """Sessions keep what is committed and their drafter, and are replayed elsewhere before anything new starts."""
        for session in sessions:
            session.on_target_lost()
            if not session.is_over:
                self._displaced.append(session)
                self._limit_wait(session)
        self._fill()

    def on_draft_up(self) -> None:
        for target in self._targets:
            for session in list(target.sessions.values()):
                self._give_draft(session)

    def on_draft_lost(self, sessions: Sequence[Session]) -> None:
        for session in sessions:
            session.on_draft_lost()
            self._give_draft(session)

    # -- matching ---------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        while (queue := self._displaced or self._waiting) and (target := self._target_for(queue[0])) is not None:
            self._place(queue.popleft(), target)

    def _place(self, session: Session, target: TargetLink) -> None:
        if session.give_up is not None:
            session.give_up.cancel()
            session.give_up = None
        if not session.was_placed:
            session.start(self._make_relay(session, target, self._best_draft()))
        session.attach_target(target)
        self._give_draft(session)

    def _give_draft(self, session: Session) -> None:
        draft = self._best_draft()
        if draft is not None and session.wants_draft:
            session.attach_draft(draft)

    def _target_for(self, session: Session) -> TargetLink | None:
        """The one that has computed the prompt already, if it has room."""
        target = None if session.parent is None else session.parent.target
        return target if target is not None and self._has_room(target) else self._best_target()

    def _has_room(self, link: TargetLink) -> bool:
        return link.is_up and len(link.sessions) < self._settings.max_sessions

    def _best_target(self) -> TargetLink | None:
        room = [link for link in self._targets if self._has_room(link)]
        return min(room, key=lambda link: len(link.sessions), default=None)

    def _best_draft(self) -> DraftLink | None:
        up = [link for link in self._drafts if link.is_up]
        return min(up, key=lambda link: len(link.sessions), default=None)
