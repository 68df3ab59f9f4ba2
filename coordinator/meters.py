"""What one session tells the histograms: while it runs, and when it is over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from speculation.messages import Proposal, Verdict

Observe: TypeAlias = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Histograms:
    """Where the values of one arm go. Seconds, or tokens."""

    queue: Observe
    prefill: Observe
    first_token: Observe
    inter_token: Observe
    decode: Observe
    per_output_token: Observe
    end_to_end: Observe
    prompt_tokens: Observe
    generation_tokens: Observe
    draft_round_trip: Observe


def _ignore(value: float) -> None: ...


NO_HISTOGRAMS = Histograms(*[_ignore] * 10)


class SessionMeter:
    """Times one session; a microsecond per verdict. Times are ``time.monotonic()``."""

    def __init__(self, histograms: Histograms = NO_HISTOGRAMS) -> None:
        self._histograms = histograms
        self._first_verdict_s = 0.0
        self._last_verdict_s = 0.0
        self._missed: tuple[int, float] | None = None  # committed tokens, and when

    def on_verdict(self, verdict: Verdict, now_s: float) -> None:
        """After a miss that no branch caught the clock runs until a proposal knows of it."""
        if self._first_verdict_s:
            self._histograms.inter_token(now_s - self._last_verdict_s)
        else:
            self._first_verdict_s = now_s
        self._last_verdict_s = now_s
        if verdict.missed and not verdict.caught:
            self._missed = verdict.start + len(verdict.token_ids), now_s

    def on_proposal(self, proposal: Proposal, now_s: float) -> None:
        if self._missed is None or proposal.is_branch:
            return
        num_committed, missed_s = self._missed
        if proposal.prefix_length >= num_committed:
            self._histograms.draft_round_trip(now_s - missed_s)
            self._missed = None

    def on_drafter_lost(self) -> None:
        self._missed = None

    def on_over(
        self, arrived_s: float, placed_s: float, over_s: float, num_prompt_tokens: int, num_tokens: int
    ) -> None:
        """The request is over, well or not; ``placed_s`` 0: it never had a target. Phases not reached do not count."""
        histograms = self._histograms
        histograms.end_to_end(over_s - arrived_s)
        if placed_s:
            histograms.queue(placed_s - arrived_s)
            histograms.prompt_tokens(num_prompt_tokens)
        if self._first_verdict_s:
            self._on_answered(arrived_s, placed_s, num_tokens)

    def _on_answered(self, arrived_s: float, placed_s: float, num_tokens: int) -> None:
        histograms, decode_s = self._histograms, self._last_verdict_s - self._first_verdict_s
        histograms.first_token(self._first_verdict_s - arrived_s)
        histograms.prefill(self._first_verdict_s - placed_s)
        histograms.decode(decode_s)
        histograms.generation_tokens(num_tokens)
        if num_tokens > 1:
            histograms.per_output_token(decode_s / (num_tokens - 1))
