"""Histogram buckets: vLLM's, so that its dashboards and alerts carry over, and finer where a small model needs it."""

from __future__ import annotations

from typing import Final

STEP_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""Seconds of a forward pass, or between two workers."""

INTER_TOKEN_S: Final = (*STEP_S, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
"""Seconds between tokens: vLLM's from 10 ms on, and 1, 2.5 and 5 ms."""

FIRST_TOKEN_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""Seconds to the first token: vLLM's, with 2.5 ms beside its 1 and 5."""

REQUEST_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Seconds of a request or a phase of it: vLLM's from 300 ms on, and finer below, where our queues and prefills are."""

TOKENS: Final = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
"""Tokens of a prompt or an answer, 1 to 500,000."""

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Upper ends of the values of the label ``batch_size``, whose last value is ``more``."""


def batch_size_label(num_sequences: int) -> str:
    """The smallest of `BATCH_SIZES` that is no less: a label with few values."""
    return next((str(size) for size in BATCH_SIZES if num_sequences <= size), "more")
