"""When news leave: gathered into one frame that reaches whoever needs them just in time.

A frame that arrives during a verify step is looked at when the step is over. So a command that leaves at once comes no
sooner than one that leaves just in time, and every frame costs the processes on its way some 0.2 ms each. The target
knows what its next step verifies, so how long it takes, learns how much sooner steps may be over and how long frames
take to the coordinator and back, and says how long commands may gather there (`speculation.outbox`). The coordinator
learns the same of the drafter, and says with each commit how long drafts may gather for its next frame. To come late is
to come a whole step late, so it is better to be early.

Where the target may be waiting for drafts nothing gathers: they leave as soon as they are drafted.
"""

from __future__ import annotations

from collections import deque

from speculation.messages import NOTHING_HEARD, Heard

MARGIN = 0.1
"""Share of the time to gather by which news are meant to come early, where nothing says by how much it may be short."""

FORECASTS = 32
"""Recent steps that say how much shorter than expected one may be."""

SHORTER = 0.1
"""Share of them that were shorter than what is told: what gathers for those comes too late."""

LEAST_MARGIN = 0.03
"""Share of the step by which news come early even if steps never are shorter. Where all took the same time, in the
simulator at 20 ms one way, drafts came at the very end of a step otherwise, and late: 13 % slower."""

TRIP_SAMPLES = 20
"""Recent trips that the estimate comes from."""

LATE_TRIPS = 0.75
"""Share of them that were not longer than the estimate. What comes late costs a whole step, but what leaves early is
drafted in less time, and drafts pass two such estimates: with 0.95 they were 4 ms early of 13 (docs/findings.md)."""

NEWS_KEPT = 32
"""News that an answer may tell of."""

MAX_GATHER_S = 1.0
"""Nobody is believed who asks for more; and a coordinator holds nothing back longer, whatever else it is told."""

ALONG = 0.25
"""Share of the target's step by which drafts may leave early in the company of others."""

MAX_PERIOD = 2.0
"""Times what is gathered for, that the target's steps are taken to last at most: there may have been a long pause
between the last two news."""

MAX_TRIP_S = 60.0
"""A longer trip is not believed: a drafter may say anything."""


class RoundTrip:
    """Seconds that news take to somebody and, as an answer, back; where the news come from."""

    def __init__(self, prior: RoundTrip | None = None) -> None:
        """Starts from ``prior``'s estimate and passes its own samples on to it."""
        self._prior = prior
        self._estimate_s: float | None = None if prior is None else prior.estimate_s
        self._samples_s: deque[float] = deque(maxlen=TRIP_SAMPLES)
        self._has_new = False  # samples that are not in the estimate yet
        self._told_s: dict[int, float] = {}  # by mark

    def on_told(self, mark: int, now_s: float) -> None:
        """News left by which the other side knows of ``mark``, a number that rises."""
        self._told_s[mark] = now_s
        if len(self._told_s) > NEWS_KEPT:
            del self._told_s[next(iter(self._told_s))]

    def on_answer(self, mark: int, held_s: float, now_s: float) -> None:
        """Something came that left ``held_s`` after the news of ``mark``. What it says of other news is ignored."""
        told_s = self._told_s.get(mark)
        if told_s is not None and 0.0 <= (trip_s := now_s - told_s - held_s) <= MAX_TRIP_S:
            self._learn(trip_s)

    def _learn(self, trip_s: float) -> None:
        self._samples_s.append(trip_s)
        self._has_new = True
        if self._prior is not None:
            self._prior._learn(trip_s)

    @property
    def estimate_s(self) -> float | None:
        """As long as nearly all trips were; None before the first."""
        if self._has_new:  # asked for less often than there are samples
            self._estimate_s = sorted(self._samples_s)[int(LATE_TRIPS * (len(self._samples_s) - 1))]
            self._has_new = False
        return self._estimate_s

    def gather_s(self, time_s: float | None) -> float:
        """How long to gather there, from the news on, what has to be here in ``time_s``.

        0 while anything is unknown, and over a link so long that it is late in any case: simulated at 5 ms one way, to
        hold drafts back for a later step cost 2 %.
        """
        estimate_s = self.estimate_s
        if estimate_s is None or time_s is None:
            return 0.0
        return max(0.0, time_s - estimate_s)


class Forecast:
    """At the target: how long a step takes at least, most of the time; by what others took of the time expected."""

    def __init__(self) -> None:
        self._shares = deque([1.0 - MARGIN] * (FORECASTS // 4), maxlen=FORECASTS)  # of the time that was expected
        self._expected_s: float | None = None

    def at_least_s(self, expected_s: float | None) -> float | None:
        """Of the next step, which is expected to take so long; None: nothing is."""
        self._expected_s = expected_s
        if expected_s is None:
            return None
        return min(1.0 - LEAST_MARGIN, sorted(self._shares)[int(SHORTER * len(self._shares))]) * expected_s

    def observe(self, took_s: float) -> None:
        """That step took so long."""
        if self._expected_s is not None:
            self._shares.append(took_s / self._expected_s)
            self._expected_s = None


class FrameTrip:
    """At the target: how long frames take to one coordinator and back."""

    def __init__(self) -> None:
        self.num_heard = 0
        """Commands that have come from there."""
        self._trip = RoundTrip()
        self._num_sent = 0

    def on_sent(self, now_s: float) -> None:
        """A frame leaves."""
        self._num_sent += 1
        self._trip.on_told(self._num_sent, now_s)

    def on_heard(self, num_commands: int, heard: Heard, now_s: float) -> None:
        """A frame with so many came, at ``now_s``."""
        self.num_heard += num_commands
        self._trip.on_answer(heard.num_frames, heard.held_s, now_s)

    def gather_s(self, step_s: float | None) -> float:
        """How long commands may gather if the step that begins now takes ``step_s``; see `RoundTrip.gather_s`."""
        return self._trip.gather_s(step_s)


class Hearing:
    """At the coordinator: what it has had of one target."""

    def __init__(self) -> None:
        self._num_frames = 0
        self._last_s = 0.0

    def on_frame(self, now_s: float) -> None:
        """A frame came."""
        self._num_frames += 1
        self._last_s = now_s

    def heard(self, now_s: float) -> Heard:
        """What a frame that leaves now tells of it."""
        return Heard(self._num_frames, now_s - self._last_s) if self._num_frames else NOTHING_HEARD


class Departure:
    """When leaves what gathers: a session's drafts at the drafter, the commands to a target at the coordinator."""

    def __init__(self) -> None:
        self._news_s: float | None = None  # when the last ones came
        self._period_s = 0.0  # from the one before; at first as good a guess as there is
        self._due_s: float | None = None
        self._due_first_s: float | None = None

    def on_news(self, gather_s: float, now_s: float) -> None:
        """News of the target, with how long to gather from now on."""
        gather_s = min(gather_s, MAX_GATHER_S) if gather_s > 0.0 else 0.0
        longest_s = min(MAX_PERIOD * gather_s, MAX_GATHER_S)
        self._period_s = gather_s if self._news_s is None else min(now_s - self._news_s, longest_s)
        self._news_s = now_s
        self._due_s = self._due_first_s = now_s + gather_s if gather_s else None

    @property
    def gathers(self) -> bool:
        """Drafts leave together at a certain time; otherwise each when it may be of use."""
        return self._due_s is not None

    def gather_for(self, time_s: float, now_s: float) -> None:
        """Without news: what follows leaves so much later, together. 0: each at once."""
        self._period_s = min(time_s, MAX_GATHER_S)
        self._due_s = self._due_first_s = now_s + self._period_s if self._period_s > 0.0 else None

    def due_s(self, now_s: float) -> float:
        """When what there is leaves; ``now_s``: at once."""
        return now_s if self._due_s is None else self._due_s

    def due_first_s(self, now_s: float) -> float:
        """The same, had nothing left since the last news."""
        return now_s if self._due_first_s is None else self._due_first_s

    def forget(self) -> None:
        """What follows leaves at once, until the next news."""
        self._due_s = self._due_first_s = None

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
        return 0.0 if self._news_s is None else now_s - self._news_s
