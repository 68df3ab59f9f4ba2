"""What a draft worker counts. docs/metrics.md says what it means."""

from __future__ import annotations

from rpc.worker_metrics import WorkerMetrics

MAX_CAUGHT_UP = 16
"""Tokens that a line catches up with: one, or what the target committed beyond its drafts. More are a prompt."""


class DraftMetrics(WorkerMetrics):
    """Its counters and histograms."""

    def __init__(self) -> None:
        super().__init__()
        drafted = self.counter("drafted_tokens", "Tokens drafted, on main lines and on branches.", "line")
        self._main, self._branch = map(drafted.labels, ("main", "branch"))

    def stepped(self, num_lines: int, num_tokens: int, num_main: int, num_branch: int, step_s: float) -> None:
        """One step over ``num_lines`` lines and ``num_tokens`` tokens that drafted so many more."""
        self.step("prefill" if num_tokens > MAX_CAUGHT_UP * num_lines else "draft", num_lines, step_s)
        self._main.inc(num_main)
        if num_branch:
            self._branch.inc(num_branch)
