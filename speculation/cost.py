"""What running costs: seconds of a verify step, by what is in it. Learned online.

The times are from a wall clock, on machines that do other things too, so medians of a few recent samples are used: one
garbage collection or noisy neighbour changes nothing.
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

MIN_STEP_S, MAX_STEP_S = 1e-9, 1e5
MAX_LEVEL = 1e3
"""A machine gets no slower, and no faster, than so many times. All are bounds on what a worker may report: what is
computed from it stays finite."""

KNOWN_BELOW = 4
"""Nothing is said about steps of less than 1/4 of the smallest seen: after prefill alone a plain step is unknown."""


def lower_median(samples: Sequence[float]) -> float:
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
        return lower_median(self.recent_s)


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
        """One step. Reports without tokens, or of a time that no step takes, are ignored."""
        if report.num_tokens <= 0 or not MIN_STEP_S <= report.step_s <= MAX_STEP_S:
            return
        self._num_observed += 1
        self._min_tokens = min(self._min_tokens, report.num_tokens)
        key = (_token_bucket(report.num_tokens), _session_bucket(max(1, report.num_sessions)))
        if key not in self._cells:
            self._cells[key] = _Cell(report.num_tokens, max(1, report.num_sessions))
            self._curves.clear()
        cell = self._cells[key]
        if cell.recent_s:
            change = report.step_s / cell.typical_s
            self._levels.append(min(max(change, 1.0 / MAX_LEVEL), MAX_LEVEL))
        cell.add(report, self._level, self._num_observed)
        if self._num_observed - self._num_fitted >= min(self._refit_every, 1 + self._num_observed // REFIT_FRACTION):
            self._num_fitted = self._num_observed
            self._curves.clear()

    @property
    def _level(self) -> float:
        return lower_median(self._levels) if self._levels else 1.0

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
