"""Whether speculation pays by the clock, whatever costs and acceptance promise.

`GoodputK` compares what steps cost with what is accepted in them. That misses a drafter that works on the target's own
device and slows its steps (two processes on one GPU: 0.8 of plain decoding at an acceptance of 1), and drafts that are
right and come too late. So now and then all sessions that share a drafter and a target decode plainly for some steps,
and their tokens per second are compared with those right before. Where drafting loses twice in a row it rests; trials
find out when that is over. Where next to nothing comes in time there is nothing to compare: it rests too.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from speculation.adaptive_k import KPolicy, Load
    from speculation.messages import Verdict

FIRST_STRETCH_TOKENS = 256
"""Committed tokens with drafts, for each session, before the first comparison: some 100 steps."""

STRETCH_TOKENS = 8192
"""The same between comparisons while drafting wins. A comparison costs about 20 plain steps: 0.2 % of it."""

LIKELY_WIN = 1.5
"""Committed tokens per step with which drafting can only lose if it makes steps half as long again. Comparisons are
then put off, up to `MAX_STRETCHES` stretches: most deployments lose nothing worth mentioning by them."""

MAX_STRETCHES = 8

TRIAL_TOKENS = 128
"""The same where drafting lost the last comparison."""

MIN_REST_TOKENS, MAX_REST_TOKENS = 256, 16384
"""Committed tokens without drafts, for each session, between trials, doubled after each that was lost. Two losses may
still be the noise of a machine, or one long text that is hard to guess: the first rest is over after a few answers."""

HOPELESS = 1.03
"""Committed tokens per step of a stretch below which nothing is timed: drafting takes as much from the machine.
`adaptive_k.SPECULATION_GAIN` asks as much of the promise; this asks it of what came in time."""

PLAIN_STEPS = 12
"""Plain steps of each session in a comparison. Their median is known to a few percent."""

DRAFTING_STEPS = 64
"""Latest steps of each session with drafts that are compared with them, ..."""

MIN_DRAFTING_STEPS = 256
"""... and of all sessions at least: over a long link most steps bring one token, and few bring many."""

SETTLING_STEPS = 3
"""Steps after drafting begins or ends that say nothing of how it will be."""

OUTLIER_FACTOR = 4.0
"""Steps that took so many times the median are left out: somebody's prefill, or the machine did something else."""


OnChange: TypeAlias = Callable[[int, bool], None]
"""With so many sessions or up to twice as many, drafting rests from now on, or does not any more."""


class _Pace:
    """Tokens per second of one session, over the latest steps."""

    def __init__(self, max_steps: int) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=max_steps)

    @property
    def is_known(self) -> bool:
        """As many steps were seen as are kept."""
        return len(self._steps) == self._steps.maxlen

    def observe(self, num_tokens: int, elapsed_s: float) -> None:
        self._steps.append((num_tokens, elapsed_s))

    def clear(self) -> None:
        self._steps.clear()

    def tokens_per_step(self) -> float:
        return sum(num_tokens for num_tokens, _ in self._steps) / max(1, len(self._steps))

    def tokens_per_s(self) -> float:
        longest_s = OUTLIER_FACTOR * median(elapsed_s for _, elapsed_s in self._steps)
        usual = [(num_tokens, elapsed_s) for num_tokens, elapsed_s in self._steps if elapsed_s <= longest_s]
        return sum(num_tokens for num_tokens, _ in usual) / max(sum(elapsed_s for _, elapsed_s in usual), 1e-9)


class _Phase(enum.Enum):
    DRAFTING = enum.auto()
    COMPARING = enum.auto()
    """All decode plainly, to be compared with how it was before."""
    RESTING = enum.auto()
    """Drafting has lost."""


class _Comparison:
    """Drafting against plain decoding under one load."""

    def __init__(self, num_sessions: int, on_change: OnChange) -> None:
        self._num_sessions = num_sessions
        self._on_change = on_change
        self._drafting = _Pace(max(MIN_DRAFTING_STEPS, DRAFTING_STEPS * num_sessions))
        self._plain = _Pace(PLAIN_STEPS * num_sessions)
        self._num_losses = 0  # in a row
        self._num_put_off = 0
        self._begin(_Phase.DRAFTING, FIRST_STRETCH_TOKENS)

    @property
    def allows_drafting(self) -> bool:
        return self._phase is _Phase.DRAFTING

    def observe(self, is_drafting: bool, num_tokens: int, elapsed_s: float) -> None:
        """One step of one session; `elapsed_s` since its step before."""
        if is_drafting is not self.allows_drafting:
            return  # the session has not followed yet, or its own policy does not draft
        (self._drafting if is_drafting else self._plain).observe(num_tokens, elapsed_s)
        self._num_left -= num_tokens
        self._num_steps += 1
        if self._phase is _Phase.COMPARING:
            if self._plain.is_known:
                self._compare()
        elif self._num_left <= 0:
            self._end_stretch()

    def _end_stretch(self) -> None:
        self._plain.clear()
        if self._phase is _Phase.RESTING:
            self._begin(_Phase.DRAFTING, TRIAL_TOKENS)
        elif self._is_hopeless():
            self._lose(max(2, self._num_losses + 1))
        elif self._can_wait():
            self._num_put_off += 1
            self._begin(_Phase.DRAFTING, self._stretch)
        else:
            self._num_put_off = 0
            self._begin(_Phase.COMPARING, 0)

    def _can_wait(self) -> bool:
        is_likely = self._drafting.tokens_per_step() >= LIKELY_WIN
        return is_likely and not self._num_losses and self._num_put_off < MAX_STRETCHES - 1

    def _is_hopeless(self) -> bool:
        num_tokens = self._stretch * self._num_sessions - self._num_left
        return num_tokens < HOPELESS * self._num_steps

    def _compare(self) -> None:
        if self._drafting.tokens_per_s() <= self._plain.tokens_per_s():
            self._lose(self._num_losses + 1)
            return
        if self.rests:
            self._on_change(self._num_sessions, False)
        self._num_losses = 0
        self._drafting.clear()
        self._begin(_Phase.DRAFTING, STRETCH_TOKENS)

    @property
    def rests(self) -> bool:
        """Drafting has lost its latest comparisons; it may be on trial."""
        return self._num_losses > 1

    def _lose(self, num_losses: int) -> None:
        """Lost so many times in a row."""
        has_rested, self._num_losses = self.rests, num_losses
        if self.rests and not has_rested:
            self._on_change(self._num_sessions, True)
        self._drafting.clear()
        if num_losses == 1:  # once may be the noise of a shared machine
            self._begin(_Phase.DRAFTING, TRIAL_TOKENS)
        else:
            self._begin(_Phase.RESTING, min(MAX_REST_TOKENS, MIN_REST_TOKENS << min(num_losses - 2, 16)))

    def _begin(self, phase: _Phase, num_tokens: int) -> None:
        self._phase = phase
        self._stretch = num_tokens
        self._num_left = num_tokens * self._num_sessions
        self._num_steps = 0


class PaceCheck:
    """What all sessions of one target and one drafter have found out, by the number of sessions at the target."""

    def __init__(self, on_change: OnChange = lambda num_sessions, rests: None) -> None:
        self._on_change = on_change
        self._comparisons: dict[int, _Comparison] = {}

    @property
    def rests(self) -> bool:
        """With some number of sessions drafting does not pay, as far as is known."""
        return any(one.rests for one in self._comparisons.values())

    def with_sessions(self, num_sessions: int) -> _Comparison:
        """Loads within a factor of two are alike."""
        num_sessions = 1 << (max(1, num_sessions).bit_length() - 1)
        if num_sessions not in self._comparisons:
            self._comparisons[num_sessions] = _Comparison(num_sessions, self._on_change)
        return self._comparisons[num_sessions]


class CheckedK:
    """A policy whose K is 0 where plain decoding has proved faster, and while that is found out."""

    def __init__(self, policy: KPolicy, check: PaceCheck) -> None:
        self._policy = policy
        self._check = check
        self._comparison = check.with_sessions(1)
        self._was_drafting = self.k() > 0
        self._num_steady = 0  # steps since drafting began or ended
        self._observed_s: float | None = None

    @property
    def name(self) -> str:
        return self._policy.name

    def k(self) -> int:
        return self._policy.k() if self._comparison.allows_drafting else 0

    def observe(self, verdict: Verdict, load: Load, now_s: float) -> None:
        is_drafting = self.k() > 0
        self._num_steady = self._num_steady + 1 if is_drafting is self._was_drafting else 0
        self._was_drafting = is_drafting
        self._comparison = self._check.with_sessions(load.num_sessions)
        if self._observed_s is not None and self._num_steady > SETTLING_STEPS:
            self._comparison.observe(is_drafting, len(verdict.token_ids), now_s - self._observed_s)
        self._observed_s = now_s
        if is_drafting or self._comparison.allows_drafting:
            self._policy.observe(verdict, load, now_s)
