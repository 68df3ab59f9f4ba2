"""What a mask excludes is never drawn, and rows without one do not notice."""

from __future__ import annotations

import numpy as np
import torch

from inference import SamplingRow, draw
from inference.adjustment import Adjustment
from inference.masking import exclude

VOCAB_SIZE = 77
HEAD_SIZE = 96
"""Padded: the last columns belong to no token."""


def mask_of(token_ids: list[int], num_bytes: int = 12) -> bytes:
    bits = np.zeros(8 * num_bytes, np.uint8)
    bits[token_ids] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def rows_of(masks: list[bytes | None], temperature: float) -> list[SamplingRow]:
    return [SamplingRow(temperature, top_k=5, top_p=0.9, seed=row, allowed=mask) for row, mask in enumerate(masks)]


def test_without_masks_the_logits_are_not_even_copied() -> None:
    logits = torch.randn(3, VOCAB_SIZE)
    assert exclude(logits, [None, None, None], logits) is logits


def test_only_what_is_allowed_is_drawn_and_nobody_else_changes() -> None:
    torch.manual_seed(1)
    logits = torch.randn(40, HEAD_SIZE) * 3
    logits[:, VOCAB_SIZE:] += 100
    before = logits.clone()
    allowed = [[row % VOCAB_SIZE, (7 * row) % VOCAB_SIZE] for row in range(40)]
    masks = [mask_of(allowed[row]) if row % 3 else None for row in range(40)]
    for temperature in (0.0, 1.0):
        draws = draw(logits, rows_of(masks, temperature), range(40), limit=VOCAB_SIZE, num_runners_up=3)
        free = draw(logits, rows_of([None] * 40, temperature), range(40), limit=VOCAB_SIZE, num_runners_up=3)
        for row, mask in enumerate(masks):
            if mask is None:
                assert (draws.token_ids[row], draws.runners_up[row]) == (free.token_ids[row], free.runners_up[row])
            else:
                assert {draws.token_ids[row], *(other.token_id for other in draws.runners_up[row])} <= {*allowed[row]}
    assert torch.equal(logits, before)


def test_a_token_that_the_mask_has_no_bit_for_is_excluded() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 70] = 9.0
    assert draw(logits, [SamplingRow(0.0, allowed=mask_of([3], num_bytes=4))], [0]).token_ids == [3]


def test_bans_count_until_nothing_would_be_left() -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 4] = 5.0
    rows = [SamplingRow(0.0, adjustment=Adjustment(banned=[4]), allowed=mask_of(ids)) for ids in ([4, 6], [4])]
    assert draw(logits, rows, [0, 0]).token_ids == [6, 4]
