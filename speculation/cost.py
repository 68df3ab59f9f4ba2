"""What waiting and running cost: seconds of a verify step, and when drafts will be here. Learned online.

Both are fed with wall-clock times from machines that do other things too, so both use medians of a few recent
samples: one garbage collection or noisy neighbour changes nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from speculation.messages import StepReport

CELL_SAMPLES = 15
"""Recent steps behind a cell's median: seven outliers in fifteen do no harm, and a lasting change shows in eight."""

PLANE_WEIGHT = 3.0
"""Steps that the plane through the neighbouring cells counts for in a cell's estimate."""

LOCAL_OCTAVES = 1.0
"""Width (standard deviation, in factors of two of tokens and of sessions) of what counts as neighbouring. The token
counts of K = 0 .. 8 span three octaves; a prefill chunk is seven away and must weigh nothing, leverage and all."""

LEVEL_SAMPLES = 9
"""Recent steps that say how fast steps are now, over how fast they were."""

STALE_STEPS = 512
"""After so many steps elsewhere a cell's samples count half: an estimate too high to be tried again fades."""

REFIT_FRACTION = 8
"""The curves are fitted again when 1/8 more steps have been seen ..."""

REFIT_EVERY = 16
"""... or 16: a fit takes about 100 µs, a median over 15 hardly moves meanwhile."""

CENTRE_TOKENS = 3
"""Tokens per session in the middle of what is decided about, K = 0 .. 8: 1 .. 9 in factors."""

RIDGE = 1e-3
"""Keeps the plane defined while all steps were alike (plain decoding: as many tokens as sessions)."""

KNOWN_BELOW = 4
"""Nothing is said about steps of less than 1/4 of the smallest seen: after prefill alone a plain step is unknown."""


def _lower_median(samples: Sequence[float]) -> float:
    """Of two the smaller, for disturbances only ever add time."""
    return sorted(samples)[(len(samples) - 1) // 2]


def _bucket(count: int, num_exact: int, per_octave: int) -> int:
    """Cell index of a count: itself up to ``num_exact``, then so many cells per factor of two."""
    if count <= num_exact:
        return count
    return num_exact + round(per_octave * math.log2(count / num_exact))


def _token_bucket(num_tokens: int) -> int:
    return _bucket(num_tokens, 16, 4)


def _session_bucket(num_sessions: int) -> int:
    return _bucket(num_sessions, 4, 2)


@dataclass(slots=True)
class _Cell:
    """Recent steps of about the same size, their seconds over the level of the time."""

    num_tokens: float
    num_sessions: float
    last_seen: int = 0
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=CELL_SAMPLES))

    def add(self, report: StepReport, level: float, index: int) -> None:
        self.recent_s.append(report.step_s / level)
        self.num_tokens += (report.num_tokens - self.num_tokens) / len(self.recent_s)
        self.num_sessions += (report.num_sessions - self.num_sessions) / len(self.recent_s)
        self.last_seen = index

    @property
    def typical_s(self) -> float:
        return _lower_median(self.recent_s)


@dataclass(frozen=True, slots=True)
class StepCurve:
    """Seconds of a step against its tokens, for one number of sessions: linear pieces, never falling."""

    num_tokens: Sequence[float]  # rising
    step_s: Sequence[float]  # never falling
    slope_s: float  # seconds per token beyond either end

    memo: dict[int, float] = field(default_factory=dict, repr=False, compare=False)  # plans ask the same few again

    def at(self, num_tokens: int) -> float:
        """Seconds of a step with so many tokens."""
        step_s = self.memo.get(num_tokens)
        if step_s is None:
            step_s = self.memo[num_tokens] = self._interpolated(num_tokens)
        return step_s

    def _interpolated(self, num_tokens: int) -> float:
        index = bisect_left(self.num_tokens, num_tokens)
        if index == 0:
            first_s = self.step_s[0]
            return max(first_s - self.slope_s * (self.num_tokens[0] - num_tokens), first_s / KNOWN_BELOW)
        left, left_s = self.num_tokens[index - 1], self.step_s[index - 1]
        if index == len(self.num_tokens):
            return left_s + self.slope_s * (num_tokens - left)
        share = (num_tokens - left) / (self.num_tokens[index] - left)
        return left_s + share * (self.step_s[index] - left_s)


@dataclass(frozen=True, slots=True)
class _Plane:
    """``base_s + token_s * num_tokens + session_s * num_sessions``, both slopes >= 0; good near its centre."""

    base_s: float
    token_s: float
    session_s: float

    def at(self, num_tokens: float, num_sessions: float) -> float:
        return self.base_s + self.token_s * num_tokens + self.session_s * num_sessions


class StepCostModel:
    """Seconds of a verify step against the tokens and sessions in it.

    Steps of about the same size share a cell. For a number of sessions the cells with as many make the curve; each
    leans on a plane fitted through the cells around, which also carries the curve beyond what was seen and to numbers
    of sessions not seen yet.

    What makes all steps slower or faster (longer sequences, other work on the machine) is a level common to all cells.
    Were it not, cells that nobody visits would keep the times of another level: after one long sequence drafts looked
    dear, K went to 1, and as nothing larger was tried any more, stayed there.
    """

    def __init__(self, refit_every: int = REFIT_EVERY) -> None:
        """After ``refit_every`` more steps, if not before, the curves are fitted again."""
        self._refit_every = refit_every
        self._cells: dict[tuple[int, int], _Cell] = {}
        self._levels: deque[float] = deque(maxlen=LEVEL_SAMPLES)  # of recent steps
        self._num_observed = 0
        self._num_fitted = 0  # observations behind the curves
        self._min_tokens = math.inf
        self._curves: dict[int, StepCurve] = {}  # by number of sessions

    def observe(self, report: StepReport) -> None:
        """One step. Reports without tokens or time are ignored."""
        if report.num_tokens <= 0 or not 0.0 < report.step_s < math.inf:
            return
        self._num_observed += 1
        self._min_tokens = min(self._min_tokens, report.num_tokens)
        key = (_token_bucket(report.num_tokens), _session_bucket(max(1, report.num_sessions)))
        if key not in self._cells:
            self._cells[key] = _Cell(report.num_tokens, max(1, report.num_sessions))
            self._curves.clear()
        cell = self._cells[key]
        if cell.recent_s:
            self._levels.append(report.step_s / cell.typical_s)
        cell.add(report, self._level, self._num_observed)
        if self._num_observed - self._num_fitted >= min(self._refit_every, 1 + self._num_observed // REFIT_FRACTION):
            self._num_fitted = self._num_observed
            self._curves.clear()

    @property
    def _level(self) -> float:
        return _lower_median(self._levels) if self._levels else 1.0

    def step_s(self, num_tokens: int, num_sessions: int = 1) -> float | None:
        """Expected seconds of a step; None until a step of at most 4 times the tokens was observed."""
        curve = self.curve(num_tokens, num_sessions)
        return None if curve is None else curve.at(num_tokens)

    def curve(self, min_tokens: int, num_sessions: int) -> StepCurve | None:
        """`step_s` for many token counts, none below ``min_tokens``; None where that is unknown."""
        if KNOWN_BELOW * min_tokens < self._min_tokens:
            return None
        curve = self._curves.get(num_sessions)
        if curve is None:
            curve = self._curves[num_sessions] = self._fit(num_sessions)
        return curve

    def _fit(self, num_sessions: int) -> StepCurve:
        cells = list(self._cells.values())
        num_tokens = np.array([cell.num_tokens for cell in cells])
        sessions = np.array([cell.num_sessions for cell in cells])
        typical_s = self._level * np.array([cell.typical_s for cell in cells])
        age = self._num_observed - np.array([cell.last_seen for cell in cells])
        weight = np.array([len(cell.recent_s) for cell in cells]) * 0.5 ** (age / STALE_STEPS)
        octaves = np.log2(num_tokens / (CENTRE_TOKENS * num_sessions)) ** 2 + np.log2(sessions / num_sessions) ** 2
        near = np.exp(-octaves / (2.0 * LOCAL_OCTAVES**2))
        plane = _fit_plane(num_tokens, sessions, typical_s, weight * near)

        lean = PLANE_WEIGHT * near
        own = (
            np.maximum(weight - 1.0, 0.0) + 0.01
        )  # a cell's first sample may be anything; far from all it is all there is
        there_s = typical_s + plane.session_s * (num_sessions - sessions)
        plane_s = plane.at(0.0, num_sessions) + plane.token_s * num_tokens
        value_s = (own * there_s + lean * plane_s) / (own + lean)
        bucket = _session_bucket(num_sessions)
        here = [index for index, key in enumerate(self._cells) if key[1] == bucket]
        points = [(float(num_tokens[i]), float(value_s[i]), float(own[i] + lean[i])) for i in here]
        points += [(float(n), plane.at(n, num_sessions), 0.01) for n in _unseen([p[0] for p in points], num_sessions)]
        floor_s = float(typical_s.min()) / KNOWN_BELOW
        points = sorted((n, max(value, floor_s), w) for n, value, w in points)
        return StepCurve([n for n, _, _ in points], closest_never_falling(points), plane.token_s)


def _unseen(seen: Sequence[float], num_sessions: int) -> list[int]:
    """Token counts at which the plane stands in for cells: K = 0, K = 8 and well beyond, unless a cell is near.

    Otherwise a straight line from there to the first prefill chunk would.
    """
    ratios = [n / num_sessions for n in seen]
    stands_in = ((1, 0.0, 1.0), (9, 9.0, 16.0), (32, 17.0, 64.0))
    return [ratio * num_sessions for ratio, low, high in stands_in if not any(low <= r <= high for r in ratios)]


def _fit_plane(
    num_tokens: NDArray[np.float64],
    sessions: NDArray[np.float64],
    step_s: NDArray[np.float64],
    weight: NDArray[np.float64],
) -> _Plane:
    """Weighted least squares with slopes >= 0; where tokens and sessions cannot be told apart they share the slope."""
    share = weight / weight.sum()
    mean_n, mean_b, mean_s = float(share @ num_tokens), float(share @ sessions), float(share @ step_s)
    dn, db, ds = num_tokens - mean_n, sessions - mean_b, step_s - mean_s
    nn = float(share @ (dn * dn)) + RIDGE * mean_n**2
    bb = float(share @ (db * db)) + RIDGE * mean_b**2
    nb, ns, bs = float(share @ (dn * db)), float(share @ (dn * ds)), float(share @ (db * ds))
    determinant = nn * bb - nb * nb
    token_s, session_s = (bb * ns - nb * bs) / determinant, (nn * bs - nb * ns) / determinant
    if session_s < 0.0:
        token_s, session_s = ns / nn, 0.0
    elif token_s < 0.0:
        token_s, session_s = 0.0, bs / bb
    token_s, session_s = max(0.0, token_s), max(0.0, session_s)
    return _Plane(mean_s - token_s * mean_n - session_s * mean_b, token_s, session_s)


def closest_never_falling(points: Sequence[tuple[float, float, float]]) -> list[float]:
    """The closest never falling values to ``(x, value, weight)`` points sorted by x: pool adjacent violators."""
    pools: list[tuple[float, float, int]] = []  # value, weight, number of points
    for _, value, weight in points:
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            left = pools.pop()
            total = left[1] + pool[1]
            pool = ((left[0] * left[1] + pool[0] * pool[1]) / total, total, left[2] + pool[2])
        pools.append(pool)
    return [value for value, _, size in pools for _ in range(size)]


PACE_SAMPLES = 9
"""Recent times behind a pace's median."""

PACE_PRIOR_SAMPLES = 2
"""Samples that the prior counts for in a new session."""

MAX_FREE_RUNS = 8
"""A first token that took more verdicts than this says that the drafter was paused or lost, not how fast it is."""

TOKEN_PATIENCE = 3.0
"""Token times after which a further token counts as not coming: the drafter is at its lookahead, or gone."""

REDRAFT_PATIENCE = 2.0
"""Times ``redraft_s`` after which a first token counts as not coming."""


class DraftPace:
    """When will drafts of one session be here? Learned at the target from verdicts and arrivals.

    Two times, both medians: ``redraft_s``, from a verdict that missed and left nothing staged to the first live
    drafted token (a round trip, drafting, queueing), and ``token_s`` per further token. Verdicts of free-runs do not
    restart the clock: the drafter has been at it since the miss.
    """

    def __init__(self, prior: DraftPace | None = None) -> None:
        """Starts from ``prior``'s times and passes its own samples on to it."""
        self._prior = prior
        self._redraft: deque[float] = deque(maxlen=PACE_SAMPLES)
        self._token: deque[float] = deque(maxlen=PACE_SAMPLES)
        self._redraft_s: float | None = None  # medians of the two
        self._token_s: float | None = None
        if prior is not None and prior.redraft_s is not None:
            self._redraft.extend([prior.redraft_s] * PACE_PRIOR_SAMPLES)
            self._redraft_s = prior.redraft_s
        if prior is not None and prior._token_s is not None:
            self._token.extend([prior._token_s] * PACE_PRIOR_SAMPLES)
            self._token_s = prior._token_s
        self._empty_since: float | None = None  # the verdict that left nothing staged; None: something came since
        self._restarted = 0.0  # the verdict from which the drafter is known to have started again; that one or later
        self._last_verdict: float | None = None
        self._missed = False  # that verdict was a miss
        self._gathers_since: float | None = None  # what comes later was told to gather
        self._num_free_runs = 0  # verdicts since that one
        self._last_arrival: float | None = None
        self._in_burst = False  # nothing but arrivals since the last one
        self._num_at_once = 0  # tokens of the burst that came at the very time of `_last_arrival`, after the first

    @property
    def redraft_s(self) -> float | None:
        """Seconds from a miss to the first live drafted token; None while unknown."""
        return self._redraft_s

    @property
    def token_s(self) -> float | None:
        """Seconds per further token; until that is known at most ``redraft_s``."""
        return self._redraft_s if self._token_s is None else self._token_s

    def on_verdict(self, now_s: float, num_staged: int, missed: bool = True) -> None:
        """A verdict left ``num_staged`` tokens staged.

        ``missed``: it contradicted a draft (staged tokens were rejected or dropped), so that the drafter has to start
        again; after a verdict that agreed with all of them more may be on its way. During a free-run of an empty
        session neither is known, and it does not matter.
        """
        self._in_burst, self._last_verdict = False, now_s
        if num_staged > 0:
            self._empty_since = None
        elif self._empty_since is not None:
            self._num_free_runs += 1
        else:
            self._empty_since = self._restarted = now_s
            self._missed, self._num_free_runs, self._gathers_since = missed, 0, None

    def on_gathering(self, now_s: float) -> None:
        """From now on drafts gather until a step is over: when the first comes says nothing of how soon it could."""
        if self._gathers_since is None:
            self._gathers_since = now_s

    def on_proposal(self, now_s: float, num_tokens: int) -> None:
        """``num_tokens`` live drafted tokens arrived at ``now_s`` (when they arrived, not when they were looked at).

        0 is a sign of life: a proposal arrived, but a free-run had contradicted it. So the drafter has to start again.
        """
        if num_tokens == 0:
            self._restart()
            return
        if self._empty_since is not None:
            gathered = self._gathers_since is not None and now_s > self._gathers_since
            is_typical = self._missed and not gathered and self._num_free_runs <= MAX_FREE_RUNS
            if is_typical and now_s > self._empty_since:
                self._learn_redraft(now_s - self._empty_since)
            self._empty_since, self._in_burst = None, False
        if not self._in_burst or self._last_arrival is None:
            self._num_at_once = 0
        elif now_s > self._last_arrival:
            self._learn_token((now_s - self._last_arrival) / (self._num_at_once + num_tokens))
            self._num_at_once = 0
        else:
            self._num_at_once += num_tokens
        self._last_arrival, self._in_burst = now_s, True

    def on_branch(self, now_s: float) -> None:
        """A branch brought tokens to a session that had none: it lacks drafts no more, and nothing is learned.

        Were the clock left running, the next first token would be timed from a miss long before its own.
        """
        if self._empty_since is not None:
            self._empty_since, self._in_burst, self._last_arrival = None, False, now_s

    def _restart(self) -> None:
        """Only what is expected starts again, not what is measured: were a slow drafter's time taken from the last
        verdict it would seem fast, and be waited for."""
        if self._empty_since is not None and self._last_verdict is not None:
            self._restarted, self._missed = self._last_verdict, self._missed or self._num_free_runs > 0

    def _learn_redraft(self, sample_s: float) -> None:
        self._redraft.append(sample_s)
        self._redraft_s = _lower_median(self._redraft)
        if self._prior is not None:
            self._prior._learn_redraft(sample_s)

    def _learn_token(self, sample_s: float) -> None:
        self._token.append(sample_s)
        self._token_s = _lower_median(self._token)
        if self._prior is not None:
            self._prior._learn_token(sample_s)

    def expected_wait_s(self, num_tokens: int, now_s: float) -> float | None:
        """Expected seconds from ``now_s`` until ``num_tokens`` more tokens have arrived.

        None while unknown, and when drafts are so late that they must be counted out. Between due and counted out the
        expectation grows with the delay: who is late by x is as likely as not late by x more.
        """
        token_s, redraft_s = self.token_s, self.redraft_s
        if token_s is None or redraft_s is None:
            return None
        if self._empty_since is None:
            since_s, first_s, patience = self._last_arrival, token_s, TOKEN_PATIENCE
        elif self._missed:
            since_s, first_s, patience = self._restarted, redraft_s, REDRAFT_PATIENCE
        else:
            since_s, first_s, patience = self._restarted, token_s, TOKEN_PATIENCE
        if since_s is None or now_s > since_s + patience * first_s:
            return None
        late_s = now_s - (since_s + first_s)
        return (-late_s if late_s < 0.0 else max(late_s, token_s)) + (num_tokens - 1) * token_s
