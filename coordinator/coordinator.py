"""The coordinator: sessions in, events out, over whatever workers are there. No wire format, no socket.

Life of a request: `Coordinator.generate` validates it, `Placement` gives it a target (and a drafter, if one is up),
the links' frames drive its `Session`, whose output the generator turns into events and text.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from coordinator.answer import Answer, merged
from coordinator.arms import PLAIN_DECODING, Arm, ArmLottery
from coordinator.clients import DraftClient, TargetClient
from coordinator.detokenizer import Detokenizer, detokenizers
from coordinator.events import GenerateEvent, StartedEvent
from coordinator.links import LinkEvents, WorkerLink
from coordinator.meters import SessionMeter
from coordinator.metrics import CoordinatorMetrics, LiveState, WorkerState
from coordinator.placement import Placement
from coordinator.request_log import RequestLog, log_fields
from coordinator.requests import GenerateRequest, Job, SpeculationDefaults, validate
from coordinator.session import DraftLink, Session, TargetLink
from coordinator.settings import CoordinatorSettings
from coordinator.structured_output import GrammarCheck
from coordinator.traffic import Traffic
from coordinator.vocabulary import ServedModel, check_same_vocabulary
from rpc.draft_codec import DraftFrame
from rpc.errors import Cancelled, ModelMismatch, OutriderError, Unavailable
from speculation.acceptance import DEPLOYMENT_WINDOW_STEPS, AcceptanceProfile
from speculation.adaptive_k import FixedK, KPolicy, Load, make_policy
from speculation.cost import StepCostModel
from speculation.messages import ModelInfo, SessionId, TargetFrame
from speculation.pace_check import PaceCheck
from speculation.relay import NO_SESSION, RelaySession
from telemetry.tracing import NO_TRACING, Span, Tracing, caller_context

LONG_PROMPT_CHARS = 20_000
"""From here on tokenizing takes milliseconds, and moves to a thread."""

OnProgress = Callable[[str], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is served, and by how many workers now."""

    model: ModelInfo
    draft_models: tuple[str, ...]
    num_targets: int
    num_drafters: int
    policy: str
    max_k: int
    traffic: Traffic
    """Live: it goes on counting."""


class Coordinator:
    """Serves one model from any number of target and draft workers. Belongs to one event loop."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        targets: Sequence[TargetClient],
        drafts: Sequence[DraftClient],
        traffic: Traffic | None = None,
        *,
        metrics: CoordinatorMetrics | None = None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        """Owns the clients from now on, which count into ``traffic``. Nothing is connected before `start`."""
        self._settings = settings
        self._traffic = traffic or Traffic()
        self.metrics = metrics or CoordinatorMetrics()
        self.metrics.watch(self._live_state)
        self._tracing = tracing
        self._request_log = RequestLog(settings.log_prompts)
        speculates = bool(drafts) and settings.max_k > 0
        self._lottery = ArmLottery(settings.plain_share if speculates else 1.0)
        self._model: ServedModel | None = None
        self._model_known = asyncio.Event()
        self._detokenizer: Callable[[], Detokenizer]  # known with the model
        self._grammars: GrammarCheck  # as well
        self._links_changed = asyncio.Event()
        self._session_ids = itertools.count(1)
        self._sessions: set[Session] = set()
        self._costs: defaultdict[str, StepCostModel] = defaultdict(StepCostModel)  # by target
        self._profiles: defaultdict[tuple[str, str], AcceptanceProfile] = defaultdict(_new_profile)
        self._pace_checks: dict[tuple[str, str], PaceCheck] = {}  # by target and draft model
        target_events = LinkEvents(
            self._check_target, self._on_target_up, self._on_target_frame, self._on_target_lost, self._links_changed.set
        )
        draft_events = LinkEvents(
            self._check_draft, self._on_draft_up, self._on_draft_frame, self._on_draft_lost, self._links_changed.set
        )
        self._targets: list[TargetLink] = [
            WorkerLink(client, target_events, self._costs[client.name]) for client in targets
        ]
        self._drafts: list[DraftLink] = [WorkerLink(client, draft_events) for client in drafts]
        self._placement = Placement(settings, self._targets, self._drafts, self._make_relay)
        self._tasks: list[asyncio.Task[None]] = []
        self._is_closed = False

    # -- life -------------------------------------------------------------------------------------------------------

    async def start(self, on_progress: OnProgress = lambda detail: None) -> None:
        """Connects; returns when one target is up and every other worker has been tried once.

        A worker that cannot be reached yet does not matter. Raises `ModelMismatch` if a worker that can be reached
        does not fit. May be cancelled; `close` is needed in any case.
        """
        self._tasks = [asyncio.create_task(link.run(), name=f"link {link.name}") for link in self._links]
        told = ""
        while not self._has_started():
            if (waiting_for := self._waiting_for()) != told:
                on_progress(told := waiting_for)
            self._links_changed.clear()
            await self._links_changed.wait()

    @property
    def _links(self) -> list[TargetLink | DraftLink]:
        return [*self._targets, *self._drafts]

    def _has_started(self) -> bool:
        for link in self._links:
            if isinstance(link.problem, ModelMismatch):
                raise link.problem
        return any(link.is_up for link in self._targets) and all(link.was_tried for link in self._links)

    def _waiting_for(self) -> str:
        missing = [f"{link.name} ({link.problem or 'connecting'})" for link in self._links if not link.is_up]
        return "waiting for " + "; ".join(missing)

    async def close(self) -> None:
        """Ends all sessions with `Cancelled`, closes all connections. Idempotent."""
        self.end_requests()
        if self._model is not None:
            self._grammars.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self._links:
            await link.close()

    def end_requests(self) -> None:
        """Takes no more requests, and ends those under way with `Cancelled`. Idempotent."""
        self._is_closed = True
        for session in list(self._sessions):
            session.fail(Cancelled("the coordinator is stopping; try another one, or again later"))

    def deployment(self) -> Deployment:
        """What is served now. Raises `Unavailable` before the first target is known."""
        drafts = [link for link in self._drafts if link.is_up and link.model is not None]
        return Deployment(
            model=self._served().info,
            draft_models=tuple(sorted({link.model.info.name for link in drafts if link.model is not None})),
            num_targets=sum(link.is_up for link in self._targets),
            num_drafters=len(drafts),
            policy=self._settings.policy,
            max_k=self._settings.max_k,
            traffic=self._traffic,
        )

    @property
    def served_model(self) -> ServedModel:
        """Model and tokenizer. Raises `Unavailable` before the first target is known."""
        return self._served()

    @property
    def num_waiting(self) -> int:
        """Requests without a place at a target."""
        return self._placement.num_waiting

    @property
    def num_sessions(self) -> int:
        """Answers under way or waiting for a place."""
        return len(self._sessions)

    def problems(self) -> Mapping[str, str]:
        """Why a worker is not in use, by its address; workers that are, or were never tried, are not in it."""
        return {link.name: link.problem.message for link in self._links if link.problem is not None}

    def _live_state(self) -> LiveState:
        workers = [WorkerState("target", link.name, link.is_up, len(link.sessions)) for link in self._targets]
        workers += [WorkerState("draft", link.name, link.is_up, len(link.sessions)) for link in self._drafts]
        return LiveState(
            model_name=self._model_name,
            max_k=self._settings.max_k,
            sessions=self._sessions,
            num_waiting=self.num_waiting,
            workers=workers,
            traffic=self._traffic,
            num_resting=sum(check.rests for check in self._pace_checks.values()),
        )

    @property
    def _model_name(self) -> str:
        return "" if self._model is None else self._model.info.name

    def _served(self) -> ServedModel:
        if self._model is None:
            raise Unavailable(self._waiting_for())
        return self._model

    # -- requests ---------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """One request: started, tokens (many times), finished; of each choice, if there are several.

        Closing the generator, or cancelling whoever awaits it, stops the work on every worker within one step; use
        ``contextlib.aclosing``. Raises `InvalidRequest`, `ModelNotFound`, `Overloaded`, `Unavailable`,
        `SessionFailed`, `SlowReader`, and `Cancelled` when the coordinator closes.
        """
        arrived_s = time.monotonic()
        changed = asyncio.Event()
        sessions = await self._accept(request, arrived_s, changed)
        try:
            for session in sessions:
                self._placement.admit(session)
            yield await self._started(sessions[0].job, sessions[0])
            answers = [
                Answer(session, choice, self._detokenizer(), self._plain_step_s)
                for choice, session in enumerate(sessions)
            ]
            async for event in merged(answers, changed):
                yield event
        except OutriderError as error:
            for session in sessions:
                session.fail(error)  # one that was refused a place does not know yet
            raise
        finally:
            for session in sessions:
                session.cancel()

    async def _started(self, job: Job, session: Session) -> StartedEvent:
        """When the request is admitted; one that asks for the prompt's logprobs is told when they are there."""
        await session.wait_placed()
        if job.prompt_logprobs is not None:
            await session.wait_first_token()
        model, num_prompt_tokens = self._served().info.name, len(job.prompt_token_ids)
        return StartedEvent(job.request_id, model, num_prompt_tokens, job.sampling.seed, session.prompt_logprobs)

    async def _accept(self, request: GenerateRequest, arrived_s: float, changed: asyncio.Event) -> list[Session]:
        """The sessions of a valid request, in the arm that it was drawn for."""
        span = self._tracing.start("generate", caller_context())
        arm = self._lottery.draw(request.speculation)
        try:
            job = await self._validate(replace(request, speculation=PLAIN_DECODING) if arm is Arm.PLAIN else request)
        except BaseException as error:
            if isinstance(error, OutriderError):
                self.metrics.refused(error, self._model_name)
            span.end(error.reason if isinstance(error, OutriderError) else Cancelled.reason)
            raise
        sessions = self._new_sessions(job, arrived_s, changed, arm, span)
        for session in sessions:
            self._request_log.accepted(session, request.prompt)
        return sessions

    async def _validate(self, request: GenerateRequest) -> Job:
        if self._is_closed:
            raise Unavailable("the coordinator is stopping; try another one, or again later")
        defaults = SpeculationDefaults(self._settings.policy, self._settings.max_k, self._settings.max_lookahead)
        if isinstance(request.prompt, str) and len(request.prompt) > LONG_PROMPT_CHARS:
            job = await asyncio.to_thread(validate, request, self._served(), defaults)
        else:
            job = validate(request, self._served(), defaults)
        if job.sampling.grammar is not None:
            await self._grammars.check(job.sampling.grammar)
        return job

    def _new_sessions(self, job: Job, arrived_s: float, changed: asyncio.Event, arm: Arm, span: Span) -> list[Session]:
        """One for each choice; the first is the parent of the others, in all that they share and in the trace."""
        model_name = self._served().info.name
        sessions: list[Session] = []
        for choice in range(job.n):
            session = Session(
                SessionId(next(self._session_ids)),
                job.of_choice(choice),
                arrived_s,
                self._settings.max_buffered_events,
                self._on_session_over,
                changed,
                sessions[0] if sessions else None,
                arm=arm,
                meter=SessionMeter(self.metrics.histograms(model_name, arm)),
                span=self._tracing.start("generate", span.context) if sessions else span,
            )
            _describe(session, model_name, choice)
            sessions.append(session)
        self._sessions.update(sessions)
        return sessions

    def _plain_step_s(self, session: Session) -> float | None:
        return self._costs[session.target_name].step_s(session.num_beside, session.num_beside)

    def _on_session_over(self, session: Session) -> None:
        self._sessions.discard(session)
        self.metrics.session_over(session, self._model_name)
        self._placement.release(session)
        self._request_log.over(session, self._served().tokenizer)

    def _make_relay(self, session: Session, target: TargetLink, draft: DraftLink | None) -> RelaySession:
        job = session.job
        contexts = [link.model.info.max_context for link in self._drafts if link.model is not None]
        return RelaySession(
            prompt=job.prompt_token_ids,
            sampling=job.sampling,
            max_length=job.max_length,
            stop_token_ids=job.stop_token_ids,
            policy=self._make_policy(job, target, draft),
            max_lookahead=job.max_lookahead,
            draft_max_length=min(contexts, default=0),  # any of them may be given to the session later
            turns=job.turns,
            max_branches=self._settings.max_branches,
            logprobs=job.logprobs,
            prompt_logprobs=job.prompt_logprobs,
            fork_of=NO_SESSION if session.parent is None or session.parent.target is not target else session.parent.id,
            trace_context=session.span.context,
            max_lookup=self._settings.max_lookup,
        )

    def _make_policy(self, job: Job, target: TargetLink, draft: DraftLink | None) -> KPolicy | None:
        if job.policy is None:
            return None
        draft_name = draft.model.info.name if draft is not None and draft.model is not None else ""
        return make_policy(
            job.policy,
            max_k=job.k,
            k=job.k if job.policy == FixedK.name else None,
            costs=self._costs[target.name],
            prior=self._profiles[target.name, draft_name],
            check=self._pace_check(target.name, draft_name),
            turns=job.turns,
        )

    def _pace_check(self, target_name: str, draft_name: str) -> PaceCheck:
        key = target_name, draft_name
        if key not in self._pace_checks:
            self._pace_checks[key] = PaceCheck(functools.partial(_log_rest, target_name, draft_name))
        return self._pace_checks[key]

    # -- workers ----------------------------------------------------------------------------------------------------

    async def _check_target(self, link: TargetLink, model: ServedModel) -> None:
        if self._model is None:
            self._model = model
            self._detokenizer = detokenizers(model.tokenizer)
            self._grammars = GrammarCheck(model)
            self._model_known.set()
        elif not _is_same_target(model.info, self._model.info):
            raise ModelMismatch(
                f"{link.name} serves {_told(model.info)}, this coordinator {_told(self._model.info)}; "
                "restart one of them"
            )
        else:
            await asyncio.to_thread(check_same_vocabulary, self._model, model)

    async def _check_draft(self, link: DraftLink, model: ServedModel) -> None:
        await self._model_known.wait()
        await asyncio.to_thread(check_same_vocabulary, self._served(), model)

    def _on_target_up(self, link: TargetLink) -> None:
        self._placement.on_target_up()
        self._links_changed.set()

    def _on_draft_up(self, link: DraftLink) -> None:
        self._placement.on_draft_up()
        self._links_changed.set()

    def _on_target_lost(self, link: TargetLink, sessions: list[Session]) -> None:
        self._placement.on_target_lost(sessions)

    def _on_draft_lost(self, link: DraftLink, sessions: list[Session]) -> None:
        self._placement.on_draft_lost(sessions)

    def _on_target_frame(self, link: TargetLink, frame: TargetFrame) -> None:
        if frame.step is not None:
            self._traffic.num_target_steps += 1
            self._costs[link.name].observe(frame.step)
        load, now_s = Load(len(link.sessions)), time.monotonic()
        wanted_in_s = link.gather(frame, now_s)
        for session_id, event in frame.items:
            session = link.sessions.get(session_id)
            if session is not None:
                try:
                    session.on_target_event(event, load, now_s, frame.step, wanted_in_s)
                except Exception as error:  # a defect in one session must not take the others along
                    _fail(session, error)

    def _on_draft_frame(self, link: DraftLink, frame: DraftFrame) -> None:
        now_s = time.monotonic()
        for session_id, event in frame:
            session = link.sessions.get(session_id)
            if session is not None:
                try:
                    session.on_draft_event(event, now_s)
                except Exception as error:  # as above
                    _fail(session, error)


def _is_same_target(info: ModelInfo, served: ModelInfo) -> bool:
    """May a session go on there? Another dtype would say other things here and there."""
    same = (info.name, info.num_parameters, info.dtype) == (served.name, served.num_parameters, served.dtype)
    return same and info.max_context >= served.max_context


def _told(info: ModelInfo) -> str:
    return f"{info.name!r} in {info.dtype} with a context of {info.max_context}"


def _new_profile() -> AcceptanceProfile:
    return AcceptanceProfile(window_steps=DEPLOYMENT_WINDOW_STEPS)


def _log_rest(target_name: str, draft_name: str, num_sessions: int, rests: bool) -> None:
    """What `PaceCheck` has found out."""
    told = {"worker": target_name, "draft_model": draft_name, "num_sessions": num_sessions}
    if rests:
        _log.warning("speculation rests: plain decoding has measured faster, twice; it is tried again", extra=told)
    else:
        _log.info("speculation pays again", extra=told)


def _describe(session: Session, model_name: str, choice: int) -> None:
    """What the session's span says from the start."""
    if session.span.is_recording:
        session.span.set(
            request_id=session.job.request_id,
            session_id=session.id,
            choice=choice,
            model=model_name,
            arm=session.arm.value,
            num_prompt_tokens=len(session.job.prompt_token_ids),
        )


def _fail(session: Session, error: Exception) -> None:
    _log.exception("session failed", extra=log_fields(session))
    session.fail(OutriderError(f"the coordinator failed at this request: {error!r}; its log says where"))
