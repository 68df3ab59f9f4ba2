"""What speculation was worth to one answer, without answering it again."""

from __future__ import annotations


def estimated_speedup(num_tokens: int, decode_s: float, plain_step_s: float | None) -> float:
    """How many times faster an answer was decoded than it would have been plainly; 0 if that cannot be told.

    ``(num_tokens - 1) * plain_step_s / decode_s``: plain decoding takes a step for each token behind the first, and
    ``plain_step_s`` is what the target's cost model expects of a step with one token of each session that it has. From
    the first token on, ``decode_s`` seconds passed. The way between target and coordinator, which plain decoding would
    pay at every step, is in ``decode_s`` alone, so the true speedup is rather higher.
    """
    if num_tokens < 2 or decode_s <= 0 or plain_step_s is None:
        return 0.0
    return (num_tokens - 1) * plain_step_s / decode_s
