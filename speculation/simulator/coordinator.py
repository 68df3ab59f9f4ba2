"""The coordinator: the real relays and policies behind a queue of frames, one handled at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from speculation.acceptance import DEPLOYMENT_WINDOW_STEPS, AcceptanceProfile
from speculation.adaptive_k import KPolicy, Load, make_policy
from speculation.cost import StepCostModel
from speculation.gathering import Hearing, RoundTrip
from speculation.messages import DraftCommand, Sampling, SessionId, TargetCommand, TargetFrame, TokenId
from speculation.outbox import Outbox
from speculation.pace_check import PaceCheck
from speculation.relay import Action, Emit, RelaySession, ToDraft, ToTarget
from speculation.simulator.clock import VirtualClock
from speculation.simulator.links import Link
from speculation.simulator.scenario import Scenario
from speculation.simulator.workers import CommandFrame, DraftFrame

CommandT = TypeVar("CommandT")


@dataclass(slots=True)
class Peer(Generic[CommandT]):
    """A worker as the coordinator sees it."""

    link: Link[CommandFrame[CommandT]]
    clock: VirtualClock
    sessions: dict[SessionId, Request] = field(default_factory=dict)
    costs: StepCostModel = field(default_factory=StepCostModel)
    """Of a target; told by its step reports."""
    hearing: Hearing = field(default_factory=Hearing)
    trip: RoundTrip = field(default_factory=RoundTrip)
    """Of a drafter."""
    outbox: Outbox[CommandT] = field(init=False)

    def __post_init__(self) -> None:
        self.outbox = Outbox(self.costs)

    def flush(self) -> None:
        """One frame for what is due; the rest is looked at again when it will be."""
        now_s = self.clock.now_s
        if self.outbox.is_empty:
            return
        due_s = self.outbox.due_s(now_s)
        if due_s <= now_s:
            self.link.send((self.outbox.take(now_s), self.hearing.heard(now_s)))
        else:
            self.clock.at(due_s, self.flush)


@dataclass(slots=True)
class Request:
    """One session under way."""

    id: SessionId
    seed: int
    prompt: tuple[TokenId, ...]
    max_length: int
    asked_s: float
    on_over: Callable[[Request], None]
    relay: RelaySession | None = None
    target: Peer[TargetCommand] | None = None
    draft: Peer[DraftCommand] | None = None
    first_token_s: float = 0.0
    over_s: float = 0.0


class ModelledCoordinator:
    """Relays between one set of workers."""

    def __init__(self, clock: VirtualClock, scenario: Scenario) -> None:
        self.targets: list[Peer[TargetCommand]] = []
        self.drafts: list[Peer[DraftCommand]] = []
        self._clock = clock
        self._scenario = scenario
        self._profile = AcceptanceProfile(window_steps=DEPLOYMENT_WINDOW_STEPS)
        self._pace_check = PaceCheck()
        self._waiting: deque[Request] = deque()
        self._free_s = 0.0  # when what is being handled will have been

    # -- what arrives -------------------------------------------------------------------------------------------

    def on_request(self, request: Request) -> None:
        self._handle(partial(self._admit, request))

    def on_target_frame(self, peer: Peer[TargetCommand], frame: TargetFrame) -> None:
        peer.hearing.on_frame(self._clock.now_s)
        self._handle(partial(self._take_target_frame, peer, frame))

    def on_draft_frame(self, peer: Peer[DraftCommand], frame: DraftFrame) -> None:
        self._handle(partial(self._take_draft_frame, peer, frame))

    def _handle(self, what: Callable[[], None]) -> None:
        """What it says goes out when it has been handled."""
        if not self._scenario.coordinator_s:
            self._turn(what)
            return
        self._free_s = max(self._free_s, self._clock.now_s) + self._scenario.coordinator_s
        self._clock.at(self._free_s, partial(self._turn, what))

    def _turn(self, what: Callable[[], None]) -> None:
        what()
        for target in self.targets:
            target.flush()
        for draft in self.drafts:
            draft.flush()

    def _take_target_frame(self, peer: Peer[TargetCommand], frame: TargetFrame) -> None:
        load, now_s = Load(len(peer.sessions)), self._clock.now_s
        if frame.step is not None:
            peer.costs.observe(frame.step)
        peer.outbox.on_frame(frame, now_s)
        wanted_in_s = peer.outbox.wanted_in_s(now_s)
        for session_id, event in frame.items:
            request = peer.sessions.get(session_id)
            if request is not None and request.relay is not None:
                self._perform(request, request.relay.on_target_event(event, load, now_s, wanted_in_s))

    def _take_draft_frame(self, peer: Peer[DraftCommand], frame: DraftFrame) -> None:
        for session_id, event in frame:
            request = peer.sessions.get(session_id)
            if request is not None and request.relay is not None:
                self._perform(request, request.relay.on_draft_event(event, self._clock.now_s))

    # -- placement ----------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        self._waiting.append(request)
        self._fill()

    def _fill(self) -> None:
        while self._waiting:
            target = min(self.targets, key=_num_sessions)
            if _num_sessions(target) >= self._scenario.max_sessions:
                return
            self._place(self._waiting.popleft(), target)

    def _place(self, request: Request, target: Peer[TargetCommand]) -> None:
        relay = request.relay = RelaySession(
            prompt=request.prompt,
            sampling=Sampling(seed=request.seed),
            max_length=request.max_length,
            stop_token_ids=(),
            policy=self._policy(target),
            max_lookahead=self._scenario.max_lookahead,
            turns=self._scenario.turns,
            max_branches=self._scenario.max_branches,
            max_lookup=self._scenario.max_lookup,
        )
        request.target = target
        target.sessions[request.id] = request
        self._perform(request, relay.on_target_up(self._clock.now_s))
        if self._scenario.policy is not None and self.drafts:
            request.draft = min(self.drafts, key=_num_sessions)
            request.draft.sessions[request.id] = request
            self._perform(request, relay.on_draft_up(self._clock.now_s, request.draft.trip))

    def _policy(self, target: Peer[TargetCommand]) -> KPolicy | None:
        name, max_k, turns = self._scenario.policy, self._scenario.max_k, self._scenario.turns
        if name is None:
            return None
        return make_policy(
            name,
            max_k=max_k,
            k=max_k if name == "fixed" else None,
            costs=target.costs,
            prior=self._profile,
            check=self._pace_check,
            turns=turns,
        )

    # -- what is said -------------------------------------------------------------------------------------------

    def _perform(self, request: Request, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, ToTarget):
                assert request.target is not None
                request.target.outbox.put(request.id, action.command, self._clock.now_s)
            elif isinstance(action, ToDraft):
                assert request.draft is not None
                request.draft.outbox.put(request.id, action.command, self._clock.now_s)
                if request.target is not None:
                    request.target.outbox.on_told_drafter(request.id, action.command)
            elif isinstance(action, Emit):
                request.first_token_s = request.first_token_s or self._clock.now_s
        if request.relay is not None and request.relay.is_over:
            self._end(request)

    def _end(self, request: Request) -> None:
        request.over_s = self._clock.now_s
        assert request.target is not None
        del request.target.sessions[request.id]
        if request.draft is not None:
            del request.draft.sessions[request.id]
        request.on_over(request)
        self._fill()


def _num_sessions(peer: Peer[TargetCommand] | Peer[DraftCommand]) -> int:
    return len(peer.sessions)
