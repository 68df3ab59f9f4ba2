"""How long a plain verify step takes at the target, as measured while serving: what speculation is compared with."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

from speculation.messages import StepReport

NUM_RECENT = 31
"""Recent steps behind a median: one that was disturbed changes nothing."""


class PlainStepTimes:
    """Median seconds of steps in which every session had one token, by their number of sessions."""

    def __init__(self) -> None:
        self._recent_s: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_RECENT))

    def observe(self, report: StepReport) -> None:
        """Steps with drafted tokens or a prompt in them are none of ours."""
        if report.num_sessions == report.num_tokens and report.step_s > 0:
            self._recent_s[report.num_sessions].append(report.step_s)

    def typical_s(self, num_sessions: int) -> float | None:
        """For so many sessions, or the nearest smaller number measured; None if there is none.

        Fewer sessions take no longer, so nothing compared with this looks faster than it is.
        """
        measured = [number for number in self._recent_s if number <= num_sessions]
        return statistics.median(self._recent_s[max(measured)]) if measured else None
