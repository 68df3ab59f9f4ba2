"""The ideal that a run is measured against: drafts always there, and nothing but the target's own steps takes time.

``tokens_per_s`` is the mean acceptance length at full K over the bare time of a verify step with K + 1 tokens. Lengths
come from a teacher-forced pass: the target's own text, and what the draft draws after each prefix of it with the same
noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BareSteps:
    """Medians of the target alone in a process, with the threads that its worker has; forward and draws."""

    plain_s: float
    verify_s: float
    """With K + 1 tokens."""
    eager_s: float
    """Plain, by transformers' own layers."""

    @staticmethod
    def median_of(times: Iterable[BareSteps]) -> BareSteps:
        """Each step's; of two the mean."""
        plain_s, verify_s, eager_s = zip(*((one.plain_s, one.verify_s, one.eager_s) for one in times), strict=True)
        return BareSteps(statistics.median(plain_s), statistics.median(verify_s), statistics.median(eager_s))


@dataclass(frozen=True, slots=True)
class Ideal:
    """What one stream could reach with K drafted tokens in every step."""

    k: int
    mean_acceptance_length: float

    def tokens_per_s(self, steps: BareSteps) -> float:
        """When steps take so long."""
        return self.mean_acceptance_length / steps.verify_s


def mean_acceptance_length(texts: Sequence[Sequence[bool]], k: int) -> float:
    """Tokens per step when ``k`` drafted tokens are verified in each, the target's own included.

    ``texts[i][j]``: the draft draws the target's token j of text i after the target's tokens before it. Steps that the
    end of a text cuts short do not count. Raises ValueError if no whole step fits.
    """
    num_tokens = num_steps = 0
    for agrees in texts:
        position = 0
        while position + k < len(agrees):
            committed = 1 + _num_accepted(agrees[position : position + k])
            num_tokens, num_steps = num_tokens + committed, num_steps + 1
            position += committed
    if not num_steps:
        raise ValueError(f"no text is longer than K = {k}")
    return num_tokens / num_steps


def _num_accepted(agrees: Sequence[bool]) -> int:
    return next((index for index, agreed in enumerate(agrees) if not agreed), len(agrees))
