"""What a simulated run came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce

import numpy as np


@dataclass(frozen=True, slots=True)
class Report:
    """Sums over one or several deployments; rates are of sums."""

    num_sessions: int
    tokens_per_s: float
    """Committed tokens per virtual second, from the first request to the last token; the sum of several deployments."""
    elapsed_s: float
    """Of the longest one."""
    num_tokens: int
    num_steps: int
    """Verdicts: one session in one verify step."""
    num_free_runs: int
    num_drafted: int
    """Of those verified."""
    num_accepted: int
    num_proposed: int
    """Drafted tokens that reached the coordinator."""
    num_dropped: int
    sum_k: int
    num_misses: int
    num_caught: int
    """Misses after which a branch was staged."""
    first_token_s: tuple[float, ...]
    """From request to first token, at the client."""
    per_token_s: tuple[float, ...]
    """Mean of each session after its first token."""
    target_steps: int
    target_busy_s: float
    target_waited_s: float
    draft_steps: int
    draft_tokens: int
    """Through the draft model, prompts included."""
    draft_busy_s: float
    num_frames: int
    """Over all links, both ways."""
    num_frames_to_target: int

    @property
    def acceptance_rate(self) -> float:
        """Accepted / verified drafted tokens; 0 if none was."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def acceptance_length(self) -> float:
        """Committed tokens per verify step."""
        return self.num_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def mean_k(self) -> float:
        return self.sum_k / self.num_steps if self.num_steps else 0.0

    @property
    def free_run_share(self) -> float:
        """Verify steps without drafted tokens."""
        return self.num_free_runs / self.num_steps if self.num_steps else 0.0

    @property
    def caught_share(self) -> float:
        """Misses after which a branch was there, over all misses; 0 without any."""
        return self.num_caught / self.num_misses if self.num_misses else 0.0

    @property
    def proposed_per_token(self) -> float:
        """Drafted tokens sent per committed one."""
        return self.num_proposed / self.num_tokens if self.num_tokens else 0.0

    def first_token_at(self, percentile: float) -> float:
        """Seconds to the first token, 0 without sessions."""
        return float(np.percentile(self.first_token_s, percentile)) if self.first_token_s else 0.0

    def per_token_at(self, percentile: float) -> float:
        """Seconds per further token, 0 without any."""
        return float(np.percentile(self.per_token_s, percentile)) if self.per_token_s else 0.0


def merged(reports: Sequence[Report]) -> Report:
    """Several deployments side by side."""
    return reduce(_merge, reports)


def _merge(one: Report, other: Report) -> Report:
    sums = {field.name: getattr(one, field.name) + getattr(other, field.name) for field in fields(Report)}
    return replace(one, **{**sums, "elapsed_s": max(one.elapsed_s, other.elapsed_s)})
