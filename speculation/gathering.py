"""When drafts leave: gathered into one frame that reaches the target just before its next step.

A frame that arrives during a verify step is looked at when the step is over. So a draft that leaves at once comes no
sooner than one that leaves just in time, and every frame costs three processes some 0.2 ms. The target knows how long
its next step will take; it learns how long news take to the drafter and back, and says with each verdict how long
drafts may gather. A share of the step is kept as a margin, for to come late is to come a whole step late.

Where the target may be waiting for drafts nothing gathers: they leave as soon as they are drafted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from speculation.messages import Proposal

MARGIN = 0.1
"""Share of the next step that drafts are meant to come early."""

TRIP_SAMPLES = 9
"""Recent trips that the estimate comes from."""

LATE_TRIPS = 0.75
"""Share of them that were not longer than the estimate."""

VERDICTS_KEPT = 32
"""Verdicts that a proposal may tell of."""

MAX_GATHER_S = 1.0
"""A drafter holds back no longer, whatever it is told."""

ALONG = 0.25
"""Share of the target's step by which drafts may leave early in the company of others."""

MAX_TRIP_S = 60.0
"""A longer trip is not believed: a drafter may say anything."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The step that begins when this one is over."""

    step_s: float | None
    """Expected seconds; None: unknown."""
    may_wait: bool
    """It may wait for drafts where there are none."""


class RoundTrip:
    """At the target: seconds that news take from a verdict to the drafter and, as a proposal, back."""

    def __init__(self, prior: RoundTrip | None = None) -> None:
        """Starts from ``prior``'s estimate and passes its own samples on to it."""
        self._prior = prior
        self._estimate_s: float | None = None if prior is None else prior._estimate_s
        self._samples_s: deque[float] = deque(maxlen=TRIP_SAMPLES)
        self._verdicts_s: dict[int, float] = {}  # by the number of tokens committed then

    def on_verdict(self, num_committed: int, now_s: float) -> None:
        """With this verdict the session has so many tokens."""
        self._verdicts_s[num_committed] = now_s
        if len(self._verdicts_s) > VERDICTS_KEPT:
            del self._verdicts_s[next(iter(self._verdicts_s))]

    def on_proposal(self, proposal: Proposal, now_s: float) -> None:
        """It arrived. What it says of a verdict that was never sent is ignored."""
        verdict_s = self._verdicts_s.get(proposal.num_committed)
        if verdict_s is not None and 0.0 <= (trip_s := now_s - verdict_s - proposal.held_s) <= MAX_TRIP_S:
            self._learn(trip_s)

    def _learn(self, trip_s: float) -> None:
        self._samples_s.append(trip_s)
        self._estimate_s = sorted(self._samples_s)[int(LATE_TRIPS * (len(self._samples_s) - 1))]
        if self._prior is not None:
            self._prior._learn(trip_s)

    def gather_s(self, step_s: float | None) -> float:
        """How long drafts may gather, counted at the drafter, if the next step takes ``step_s``.

        0 while anything is unknown, and over a link so long that they are late for that step in any case: simulated at
        5 ms one way, to hold them back for a later one cost 2 %.
        """
        if self._estimate_s is None or step_s is None:
            return 0.0
        return max(0.0, (1.0 - MARGIN) * step_s - self._estimate_s)


class Departure:
    """At the drafter: when what is drafted for a session leaves."""

    def __init__(self) -> None:
        self._commit_s: float | None = None  # when the last one came
        self._period_s = 0.0  # from the one before; at first as good a guess as there is
        self._due_s: float | None = None

    def on_commit(self, gather_s: float, now_s: float) -> None:
        """News of the target, with how long drafts may gather from now on."""
        gather_s = min(gather_s, MAX_GATHER_S) if gather_s > 0.0 else 0.0
        self._period_s = gather_s if self._commit_s is None else now_s - self._commit_s
        self._commit_s = now_s
        self._due_s = now_s + gather_s if gather_s else None

    @property
    def gathers(self) -> bool:
        """Drafts leave together at a certain time; otherwise each when it may be of use."""
        return self._due_s is not None

    def may_wait_until(self, next_s: float) -> bool:
        """Is the next occasion, ``next_s``, early enough?"""
        return self._due_s is not None and next_s <= self._due_s

    def may_go_along(self, now_s: float) -> bool:
        """Is it so nearly time that a frame of other sessions, which leaves now, should take these drafts too?"""
        return self._due_s is not None and self._due_s - now_s <= ALONG * self._period_s

    def on_left(self, now_s: float) -> None:
        """What there was has left; what follows does so a step later, unless a commit says otherwise before."""
        if self._due_s is not None:
            self._due_s = now_s + self._period_s

    def held_s(self, now_s: float) -> float:
        """Seconds since the last news of the target; 0 before the first."""
        return 0.0 if self._commit_s is None else now_s - self._commit_s
