"""What a target worker counts. docs/metrics.md says what it means."""

from __future__ import annotations

from collections.abc import Sequence

from rpc.worker_metrics import WorkerMetrics
from speculation.draft_tree import Graft
from target_worker.sessions import TargetEntry


class TargetMetrics(WorkerMetrics):
    """Its counters and histograms."""

    def __init__(self) -> None:
        super().__init__()
        tokens = self.counter("step_tokens", "Tokens that went through the model, by why; draft: as a guess.", "kind")
        self._prefilled, self._decoded, self._drafted = map(tokens.labels, ("prefill", "decode", "draft"))
        proposals = self.counter("proposals", "Proposals that came, by what became of them.", "outcome")
        self._live, self._stale, self._dropped = map(proposals.labels, ("live", "stale", "dropped"))
        self._waited_s = self.counter("draft_wait_seconds", "Time that steps waited for drafts.")
        self._preemptions = self.counter("num_preemptions", "Sessions that gave up their KV memory for others.")

    def proposal(self, graft: Graft) -> None:
        """Live: some of it can be verified. Stale: its positions are decided. Dropped: it fits nowhere."""
        outcome = self._live if graft.num_new else self._stale if graft.num_late else self._dropped
        outcome.inc()

    def preempted(self) -> None:
        self._preemptions.inc()

    def stepped(self, entries: Sequence[TargetEntry], step_s: float, waited_s: float) -> None:
        """One verify step."""
        num_drafted = sum(len(entry.drafted) for entry in entries)
        num_decoded = sum(len(entry.token_ids) == len(entry.drafted) + 1 for entry in entries)
        num_prefilled = sum(len(entry.token_ids) for entry in entries) - num_drafted - num_decoded
        self.step(_kind(num_prefilled, num_decoded, num_drafted), len(entries), step_s)
        self._decoded.inc(num_decoded)
        if num_prefilled:
            self._prefilled.inc(num_prefilled)
        if num_drafted:
            self._drafted.inc(num_drafted)
        if waited_s:
            self._waited_s.inc(waited_s)


def _kind(num_prefilled: int, num_decoded: int, num_drafted: int) -> str:
    if num_prefilled:
        return "mixed" if num_decoded else "prefill"
    return "verify" if num_drafted else "decode"
