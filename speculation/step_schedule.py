"""What enters the next verify step of a target worker: planned drafts first, prefills in what is left of the budget.

`StepSchedule` belongs to one target and knows what its steps cost, how often drafts are right and when they come. It is
told the sessions, the time and the room in memory, and answers with a step to run or a time to wait; whoever runs the
step reports what it took. So the engine on the model thread and the simulator schedule alike.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from speculation.cost import StepCostModel
from speculation.experience import Experience
from speculation.gathering import Forecast
from speculation.messages import OpenTarget, SessionId, StepReport, TokenId
from speculation.planner import MAX_WAITING_SESSIONS, Candidate, StepPlan, StepPlanner
from speculation.verifier import VerifierSession

LOOK_EVERY = 48
"""Times that a session without drafts would not be waited for, of which one leaves them ungathered: how soon they can
come is seen only then, and may have changed."""

EARLY = 0.95
"""Share of a step within which a session's first drafts have to be expected if the drafter is to gather too."""

MAX_PROMPT_LOGPROBS = 128
"""Of one step and session: each takes a row of logits, which for a large vocabulary is half a megabyte."""


@dataclass(slots=True)
class CachedSession:
    """A session and how much of it is in the KV cache. Between steps the cache holds committed tokens only."""

    id: SessionId
    """Of all sessions of this worker, whoever their coordinators are."""
    verifier: VerifierSession
    num_cached: int = 0

    @property
    def num_uncached(self) -> int:
        """Committed tokens that have not been through the model; 1 between steps of plain decoding."""
        return len(self.verifier.token_ids) - self.num_cached

    @property
    def is_decoding(self) -> bool:
        return self.num_uncached == 1

    def forget_uncommitted(self) -> None:
        """After a step: the cache keeps what was committed before the target's own, newest token."""
        self.num_cached = len(self.verifier.token_ids) - 1


SessionT = TypeVar("SessionT", bound=CachedSession)


@dataclass(slots=True)
class StepEntry(Generic[SessionT]):
    """What one session contributes to one forward pass."""

    session: SessionT
    token_ids: list[TokenId]
    """Uncached committed tokens, then the drafted ones."""
    drafted: list[TokenId]
    is_complete: bool
    """False for a prefill chunk that does not reach the last committed token: nothing is drawn for it."""
    num_prompt_logits: int = 0
    """Rows that are wanted for the logprobs of the prompt, before those that are drawn from."""
    num_looked_up: int = 0
    """How many of the drafted ones, the last, are no drafter's."""

    @property
    def num_draws(self) -> int:
        return len(self.drafted) + 1 if self.is_complete else 0

    @property
    def num_logits(self) -> int:
        return self.num_prompt_logits + self.num_draws

    def without_lookup(self) -> StepEntry[SessionT]:
        """The same step with what a drafter drafted."""
        return self.cut(len(self.drafted) - self.num_looked_up)

    def without_drafted(self) -> StepEntry[SessionT]:
        """The same step for this session, as plain decoding."""
        return self.cut(0)

    def cut(self, num_drafted: int) -> StepEntry[SessionT]:
        """The same step with the first ``num_drafted`` of its drafted tokens."""
        num_tokens = len(self.token_ids) - len(self.drafted) + num_drafted
        return StepEntry(
            self.session,
            self.token_ids[:num_tokens],
            self.drafted[:num_drafted],
            self.is_complete,
            self.num_prompt_logits,
            max(0, num_drafted + self.num_looked_up - len(self.drafted)),
        )


@dataclass(frozen=True, slots=True)
class NextStep(Generic[SessionT]):
    """What to do next; neither waiting nor entries: there is no work."""

    entries: list[StepEntry[SessionT]]
    wait_s: float = 0.0
    """Not 0: wait at most so long for commands, then ask again."""
    waited_s: float = 0.0
    """Time spent waiting for this step."""


class Outlook(NamedTuple):
    """What is said of the step that begins, when the one before is over."""

    step_s: float | None
    """Seconds that it takes at least, most of the time. None where nothing should gather for it: that is unknown, it
    waits for drafts, or there is none."""
    drafts_at_once: bool = False
    """Drafts may come so late in it that only the coordinator should gather, not the drafter."""


NO_OUTLOOK = Outlook(None)


class StepSchedule(Generic[SessionT]):
    """Chooses the steps of one target worker and learns from them."""

    def __init__(self, max_step_tokens: int, looks_up: bool = True) -> None:
        """``max_step_tokens``: tokens of a step, prefill included. ``looks_up``: `speculation.prompt_lookup`."""
        self._max_step_tokens = max_step_tokens
        self._costs = StepCostModel()
        self._planner = StepPlanner(self._costs, max_step_tokens)
        self._experience = Experience() if looks_up else Experience(lookups=None)
        self._waiting_since: float | None = None
        self._may_wait = True  # for drafts: not after it was said that they may gather
        self._num_gathered = 0  # times in a row that they did although a session had none
        self._forecast = Forecast()

    def open(self, command: OpenTarget, vocab_size: int) -> VerifierSession:
        """A session that starts from what the worker knows of its drafters, and adds to it."""
        return VerifierSession(command, vocab_size, self._experience)

    def next(self, sessions: Collection[SessionT], now_s: float, num_free_tokens: int) -> NextStep[SessionT]:
        """The next step over ``sessions``, oldest first; ``num_free_tokens`` KV positions belong to nobody."""
        decoding, prefilling = _by_phase(sessions)
        waited_s = now_s - self._waiting_since if self._waiting_since is not None else 0.0
        plan = self._plan(decoding, prefilling, now_s, waited_s, self._may_wait)
        if plan.wait_s > 0:
            self._waiting_since = now_s if self._waiting_since is None else self._waiting_since
            return NextStep([], plan.wait_s)
        self._waiting_since = None
        planned = [session for session in decoding if session.id in plan.num_drafted]  # others wait for their turn
        entries = [_decode_entry(session, plan.num_drafted[session.id]) for session in planned]
        self._add_prefills(entries, prefilling, num_free_tokens)
        return NextStep(entries, waited_s=waited_s)

    def report(self, entries: Sequence[StepEntry[SessionT]], step_s: float, waited_s: float) -> StepReport:
        """What the step with these entries cost, which is remembered."""
        num_tokens = sum(len(entry.token_ids) for entry in entries)
        report = StepReport(step_s, len(entries), num_tokens, waited_s)
        self._costs.observe(report)
        self._forecast.observe(step_s)
        return report

    def outlook(self, sessions: Collection[SessionT], now_s: float) -> Outlook:
        """What to say of the next step, of ``sessions``."""
        lacking: list[SessionT] = []
        if len(sessions) <= MAX_WAITING_SESSIONS:
            lacking = [session for session in sessions if session.verifier.lacks_drafts]
        self._may_wait = not sessions or self._wants_at_once(sessions, lacking, now_s)
        if not self._may_wait:
            for session in sessions:
                session.verifier.pace.on_gathering(now_s)
        step_s = self._forecast.at_least_s(None if self._may_wait else self._next_step_s(sessions, now_s))
        return Outlook(step_s, step_s is not None and bool(lacking) and not self._come_early(lacking, now_s))

    def _wants_at_once(self, sessions: Collection[SessionT], lacking: Collection[SessionT], now_s: float) -> bool:
        """Are commands for the next step to leave as soon as there are any?

        If it would wait for drafts; while nothing is known of when they come; and now and then, to see how soon they
        can.
        """
        if any(session.verifier.takes_turns for session in sessions):
            return True
        if not lacking:
            return False
        self._num_gathered += 1
        known = all(session.verifier.pace.redraft_s is not None for session in lacking)
        if known and self._num_gathered < LOOK_EVERY and not self._plan(*_by_phase(sessions), now_s).wait_s:
            return False
        self._num_gathered = 0
        return True

    def _come_early(self, sessions: Collection[SessionT], now_s: float) -> bool:
        """Are the first drafts expected well before the end of the next step?"""
        step_s = self._costs.step_s(len(sessions), len(sessions))
        first_s = [session.verifier.pace.expected_wait_s(1, now_s) for session in sessions]
        return step_s is not None and all(one_s is not None and one_s <= EARLY * step_s for one_s in first_s)

    def _next_step_s(self, sessions: Collection[SessionT], now_s: float) -> float | None:
        decoding, prefilling = _by_phase(sessions)
        num_drafted = sum(self._plan(decoding, prefilling, now_s, may_wait=False).num_drafted.values())
        num_tokens = len(decoding) + num_drafted + sum(session.num_uncached for session in prefilling)
        return self._costs.step_s(min(num_tokens, self._max_step_tokens), max(len(decoding), 1))

    def _plan(
        self,
        decoding: Sequence[SessionT],
        prefilling: Sequence[SessionT],
        now_s: float,
        waited_s: float = 0.0,
        may_wait: bool = True,
    ) -> StepPlan:
        num_prefill_tokens = min(sum(session.num_uncached for session in prefilling), self._max_step_tokens)
        return self._planner.plan(
            [_candidate(session) for session in decoding], now_s, waited_s, num_prefill_tokens, may_wait
        )

    def _add_prefills(
        self, entries: list[StepEntry[SessionT]], prefilling: Sequence[SessionT], num_free_tokens: int
    ) -> None:
        budget = self._max_step_tokens - sum(len(entry.token_ids) for entry in entries)
        for session in prefilling:
            if budget <= 0:
                break
            if not entries or self._has_memory_for(session, num_free_tokens):
                entries.append(_prefill_entry(session, budget))
                budget -= len(entries[-1].token_ids)

    def _has_memory_for(self, session: SessionT, num_free_tokens: int) -> bool:
        """A prefill that cannot end well must not push out sessions that run; alone, it is tried in any case."""
        return session.num_uncached + self._max_step_tokens // 4 <= num_free_tokens


def _by_phase(sessions: Collection[SessionT]) -> tuple[list[SessionT], list[SessionT]]:
    """Those that decode and those that prefill."""
    decoding = [session for session in sessions if session.is_decoding]
    prefilling = [session for session in sessions if not session.is_decoding]
    return decoding, prefilling


def _candidate(session: CachedSession) -> Candidate:
    verifier = session.verifier
    return Candidate(
        session_id=session.id,
        num_staged=verifier.num_staged,
        k=verifier.k,
        survival=verifier.profile.survival(verifier.k),
        survival_now=verifier.survival,
        pace=verifier.pace if verifier.k else None,
        turn=verifier.turn,
        looked_up=verifier.lookup_chances,
    )


def _decode_entry(session: SessionT, num_drafted: int) -> StepEntry[SessionT]:
    """The last committed token and up to ``num_drafted`` staged ones."""
    drafted = session.verifier.drafted(num_drafted)
    num_looked_up = len(drafted) - session.verifier.num_drafted(len(drafted))
    token_ids = [session.verifier.token_ids[-1], *drafted]
    return StepEntry(session, token_ids, drafted, is_complete=True, num_looked_up=num_looked_up)


def _prefill_entry(session: SessionT, max_tokens: int) -> StepEntry[SessionT]:
    """The next uncached tokens; complete when they reach the last committed one."""
    collects = session.verifier.prompt_logprobs is not None
    num_tokens = min(max_tokens, MAX_PROMPT_LOGPROBS) if collects else max_tokens
    stop = min(len(session.verifier.token_ids), session.num_cached + num_tokens)
    token_ids = list(session.verifier.token_ids[session.num_cached : stop])
    is_complete = stop == len(session.verifier.token_ids)
    return StepEntry(session, token_ids, [], is_complete, len(token_ids) - is_complete if collects else 0)
