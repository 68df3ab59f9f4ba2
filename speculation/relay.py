"""The coordinator's side of one session: events in, actions out.

`RelaySession` is a state machine without I/O. Every ``on_...`` method takes one event and returns the actions the
shell has to carry out, in order. It keeps what is needed to place the session on another target (prompt + committed)
and to (re)admit a drafter at any moment with one `OpenDraft`.

Drafter states::

    ABSENT --on_draft_up--> IDLE --K > 0--> DRAFTING --K = 0--> PAUSED --K > 0--> DRAFTING
       ^                     ^------- on_target_lost -----'-------------'
       '------------- on_draft_lost, session error, from any state -----'

In IDLE and PAUSED nothing is sent to the drafter at all: K = 0 costs no message. What was committed meanwhile goes
along when drafting resumes.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from speculation.adaptive_k import KPolicy, Load
from speculation.gathering import RoundTrip
from speculation.messages import (
    CloseSession,
    Commit,
    DraftCommand,
    DraftEvent,
    FinishReason,
    LogprobOptions,
    OpenDraft,
    OpenTarget,
    Proposal,
    Sampling,
    SessionError,
    SessionId,
    SetK,
    SetLookahead,
    TargetCommand,
    TargetEvent,
    TokenId,
    TokenLogprobs,
    Verdict,
)
from speculation.proposal_gate import ProposalGate
from speculation.session_stats import SessionStats

NO_SESSION = SessionId(0)


@dataclass(frozen=True, slots=True)
class ToTarget:
    """Send to the session's target."""

    command: TargetCommand


@dataclass(frozen=True, slots=True)
class ToDraft:
    """Send to the session's drafter."""

    command: DraftCommand


@dataclass(frozen=True, slots=True)
class Emit:
    """Give to the client: the first ``num_accepted`` tokens were drafted, the next ``num_looked_up_accepted`` looked
    up."""

    token_ids: tuple[TokenId, ...]
    num_accepted: int
    num_drafted: int
    k: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    """As many as ``token_ids`` if the session asked for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt's tokens from the second on, in the first one if the session asked."""
    num_looked_up: int = 0
    """Verified in the step."""
    num_looked_up_accepted: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """The session ended well; both workers have been told or know."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    """The session cannot go on."""

    error: SessionError


Action: TypeAlias = ToTarget | ToDraft | Emit | Finish | Fail


class _Drafter(enum.Enum):
    ABSENT = enum.auto()
    IDLE = enum.auto()
    DRAFTING = enum.auto()
    PAUSED = enum.auto()


_OPEN = (_Drafter.DRAFTING, _Drafter.PAUSED)


OPENING_LOOKAHEAD = 2
"""Until the first verdict the drafter need only be warm. More would take cycles from the prefill next door: on two
cores a full lookahead made the first token 12 % later, two tokens 6 %, and the speed was the same."""


LOOKAHEAD_STEPS = 5
"""Steps to draft ahead. Two would do if drafts travelled in no time; over a link of 20 ms five bring 13 % more
tokens per second, at 5 ms 5 % (acceptance 0.91, simulated; 40 and 19 % at 0.97), and without a link nothing is lost:
what to draft next is decided by what it is worth (`draft_schedule`), so this only bounds it."""


def lookahead_for(k: int, max_lookahead: int) -> int:
    """How far to draft ahead when the target verifies ``k`` tokens a step: those and its own one, in five steps."""
    return min(max_lookahead, LOOKAHEAD_STEPS * (k + 1)) if k else 0


class RelaySession:
    """One session as its coordinator sees it."""

    def __init__(
        self,
        prompt: Sequence[TokenId],
        sampling: Sampling,
        max_length: int,
        stop_token_ids: Sequence[TokenId],
        policy: KPolicy | None,
        max_lookahead: int,
        draft_max_length: int = 0,
        turns: bool = False,
        max_branches: int = 0,
        logprobs: LogprobOptions | None = None,
        prompt_logprobs: int | None = None,
        fork_of: SessionId = NO_SESSION,
        trace_context: str = "",
        max_lookup: int = 0,
    ) -> None:
        """``policy`` None is plain decoding; ``draft_max_length``, if not 0, is where the draft's context ends.

        ``max_lookup``: as in `OpenTarget`; nothing is looked up in plain decoding. ``turns``: draft, then verify, never
        both (`speculation.turns`).
        """
        self.stats = SessionStats()
        self._token_ids = list(prompt)
        self._sampling = sampling
        self._max_length = max_length
        self._stop_token_ids = tuple(stop_token_ids)
        self._policy = policy
        self._max_lookahead = max_lookahead
        self._draft_max_length = min(draft_max_length, max_length) if draft_max_length else max_length
        self._turns = turns
        self._max_branches = 0 if turns or sampling.by_ratio else max_branches
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
        self._fork_of = fork_of
        self._max_lookup = 0 if policy is None or turns else max_lookup
        self._trace_context = trace_context
        self._drafter = _Drafter.ABSENT
        self._target_open = False
        self._over = False
        self._k = 0  # what the target has been told
        self._draft_knows = 0  # committed tokens that the drafter has been told
        self._lookahead = 0  # what the drafter has been told
        self._gate = ProposalGate(sampling.by_ratio)
        self._trip = RoundTrip()  # to the drafter
        self._gather_s = 0.0  # what commits say

    @property
    def is_over(self) -> bool:
        """Finished, failed or cancelled; further events are ignored."""
        return self._over

    @property
    def token_ids(self) -> Sequence[TokenId]:
        """Prompt and committed tokens; a live view, not to be changed."""
        return self._token_ids

    # -- target -------------------------------------------------------------------------------------------------

    def on_target_up(self, now_s: float) -> list[Action]:
        """A target is there: first placement, or replacement after a loss by replaying what is committed."""
        if self._over or self._target_open:
            return []
        self._target_open = True
        self._k = self._wanted_k()
        is_first = self.stats.num_steps == 0
        command = OpenTarget(
            token_ids=tuple(self._token_ids),
            sampling=self._sampling,
            max_length=self._max_length,
            stop_token_ids=self._stop_token_ids,
            k=self._k,
            turns=self._turns,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs if is_first else None,  # what has been told is not computed again
            fork_of=self._fork_of if is_first else NO_SESSION,
            trace_context=self._trace_context,
            max_lookup=self._max_lookup,
        )
        return [ToTarget(command), *self._steer_drafter()]

    def on_target_lost(self, now_s: float) -> list[Action]:
        """The drafter is closed until there is another: what it has sent is lost, and it would not send it again."""
        if self._over or not self._target_open:
            return []
        self._target_open = False
        self.stats.num_target_losses += 1
        return self._close_drafter()

    def on_target_event(self, event: TargetEvent, load: Load, now_s: float, wanted_in_s: float = 0.0) -> list[Action]:
        """A verdict or an error from the target that holds the session.

        ``wanted_in_s``: until drafts should be here, to leave with the next frame to the target; 0: as soon as any are.
        """
        if self._over or not self._target_open:
            return []
        if isinstance(event, SessionError):
            return self._end([Fail(event)], close_target=False)
        return self._on_verdict(event, load, now_s, wanted_in_s)

    def _on_verdict(self, verdict: Verdict, load: Load, now_s: float, wanted_in_s: float) -> list[Action]:
        self._token_ids.extend(verdict.token_ids)
        self._gate.on_verdict()
        self._trip.on_told(len(self._token_ids), now_s)
        self._gather_s = self._trip.gather_s(wanted_in_s or None)
        self.stats.count(verdict, self._k)
        emit = Emit(
            *(verdict.token_ids, verdict.num_accepted, verdict.num_drafted, self._k),
            *(verdict.logprobs, verdict.prompt_logprobs, verdict.num_looked_up, verdict.num_looked_up_accepted),
        )
        if verdict.finish_reason is not None:
            return self._end([emit, Finish(verdict.finish_reason)], close_target=False)
        if self._policy is not None and self._drafter is not _Drafter.ABSENT:
            self._policy.observe(verdict, load, now_s)
        return [*self._steer_drafter(), emit, *self._steer_target()]

    # -- drafter ------------------------------------------------------------------------------------------------

    def on_draft_up(self, now_s: float, trip: RoundTrip | None = None) -> list[Action]:
        """A drafter is there, for the first time or again. ``trip`` is that to the drafter, of all its sessions."""
        if self._over or self._policy is None or self._drafter is not _Drafter.ABSENT:
            return []
        self._drafter = _Drafter.IDLE
        self._trip = RoundTrip(trip)
        return self._steer_both()

    def on_draft_lost(self, now_s: float) -> list[Action]:
        """Plain decoding from the next step."""
        if self._over or self._drafter is _Drafter.ABSENT:
            return []
        self.stats.num_draft_losses += 1
        self._drafter = _Drafter.ABSENT
        return self._steer_target()

    def on_draft_event(self, event: DraftEvent, now_s: float) -> list[Action]:
        """A proposal goes to the target as it is; an error means no more drafts from this drafter."""
        if self._over or self._drafter not in _OPEN:
            return []
        if isinstance(event, SessionError):
            return self.on_draft_lost(now_s)
        self._trip.on_answer(event.num_committed, event.held_s, now_s)
        return self._on_proposal(event)

    def _on_proposal(self, proposal: Proposal) -> list[Action]:
        """Stale ones go too: the target counts how many of their tokens were right."""
        self.stats.num_proposed += len(proposal.token_ids)
        self.stats.q_bytes_received += _q_bytes(proposal)
        useful = self._gate.let_through(proposal) if self._target_open and self._k else None
        if useful is None:
            self.stats.num_dropped += len(proposal.token_ids)
            return []
        self.stats.q_bytes_relayed += _q_bytes(useful)
        return [ToTarget(useful)]

    # -- ending -------------------------------------------------------------------------------------------------

    def cancel(self, now_s: float) -> list[Action]:
        """The client is gone, or time is up: work stops on both workers."""
        return [] if self._over else self._end([], close_target=self._target_open)

    def _end(self, actions: list[Action], close_target: bool) -> list[Action]:
        self._over = True
        if self._drafter in _OPEN:
            actions.append(ToDraft(CloseSession()))
        if close_target:
            actions.append(ToTarget(CloseSession()))
        return actions

    # -- steering -----------------------------------------------------------------------------------------------

    def _wanted_k(self) -> int:
        if self._policy is None or self._drafter is _Drafter.ABSENT:
            return 0
        if self._draft_max_length <= len(self._token_ids) + 1:  # the drafter's context is full
            return 0
        if self._turns:  # the target waits for K drafts, so K is no more than the drafter may draft
            return min(self._policy.k(), self._max_lookahead, self._draft_max_length - len(self._token_ids))
        return self._policy.k()

    def _wanted_lookahead(self) -> int:
        k = self._wanted_k()
        return k if self._turns else lookahead_for(k, self._max_lookahead)

    def _steer_both(self) -> list[Action]:
        return [*self._steer_drafter(), *self._steer_target()]

    def _steer_target(self) -> list[Action]:
        k = self._wanted_k()
        if not self._target_open or k == self._k:
            return []
        self._k = k
        return [ToTarget(SetK(k))]

    def _steer_drafter(self) -> list[Action]:
        """Brings the drafter to the lookahead that K asks for, with the commits it has missed."""
        if self._drafter is _Drafter.ABSENT or not self._target_open:
            return []
        lookahead = self._wanted_lookahead()
        if lookahead == 0:
            return self._pause()
        if self._drafter is _Drafter.IDLE:
            return self._open_drafter(lookahead if self.stats.num_steps else min(lookahead, OPENING_LOOKAHEAD))
        actions: list[Action] = self._catch_up()
        if lookahead != self._lookahead:
            actions.append(ToDraft(SetLookahead(lookahead)))
        self._drafter, self._lookahead = _Drafter.DRAFTING, lookahead
        return actions

    def _open_drafter(self, lookahead: int) -> list[Action]:
        self._drafter, self._lookahead = _Drafter.DRAFTING, lookahead
        self._draft_knows = len(self._token_ids)
        command = OpenDraft(
            token_ids=tuple(self._token_ids),
            sampling=self._sampling,
            lookahead=lookahead,
            max_length=self._draft_max_length,
            max_branches=self._max_branches,
            stop_token_ids=self._stop_token_ids if len(self._token_ids) < self._sampling.min_length else (),
            trace_context=self._trace_context,
        )
        return [ToDraft(command)]

    def _close_drafter(self) -> list[Action]:
        if self._drafter not in _OPEN:
            return []
        self._drafter = _Drafter.IDLE
        return [ToDraft(CloseSession())]

    def _catch_up(self) -> list[Action]:
        start, self._draft_knows = self._draft_knows, len(self._token_ids)
        missed = tuple(self._token_ids[start:])
        return [ToDraft(Commit(start, missed, self._gather_s))] if missed else []

    def _pause(self) -> list[Action]:
        if self._drafter is not _Drafter.DRAFTING:
            return []
        self._drafter, self._lookahead = _Drafter.PAUSED, 0
        return [ToDraft(SetLookahead(0))]


def _q_bytes(proposal: Proposal) -> int:
    if not proposal.distributions:  # as mostly
        return 0
    return sum(distribution.num_bytes for distribution in proposal.distributions)
