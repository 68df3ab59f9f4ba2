"""Noise made ahead is the noise: bit by bit, in whatever order positions and seeds are asked for."""

from __future__ import annotations

import pytest
import torch

from inference import SamplingRow, draw, gumbel
from inference.noise_ahead import gumbel_of_all, gumbel_of_chains, is_made_ahead

CPU = torch.device("cpu")
SEEDS = [3, 2**64 - 1, 3, 3, 0, 3]
POSITIONS = [7, 0, 8, 7, 131_071, 6]  # back and forth over the border of a block


@pytest.mark.parametrize("vocab_size", [1, 100, 2_048, 5_000, 20_000])
def test_the_bits_of_gumbel(vocab_size: int) -> None:
    expected = gumbel(SEEDS, POSITIONS, torch.arange(vocab_size))
    assert torch.equal(gumbel_of_all(SEEDS, POSITIONS, vocab_size, CPU), expected)
    for row, (seed, position) in enumerate(zip(SEEDS, POSITIONS, strict=True)):
        assert torch.equal(gumbel_of_all([seed], [position], vocab_size, CPU), expected[row : row + 1])


@pytest.mark.parametrize("vocab_size", [1, 2_048, 20_000])
def test_the_bits_of_gumbel_in_a_row(vocab_size: int) -> None:
    found = gumbel_of_chains(SEEDS, POSITIONS, 3, vocab_size)
    for depth in range(3):
        expected = gumbel(SEEDS, [position + depth for position in POSITIONS], torch.arange(vocab_size))
        assert torch.equal(found[:, depth], expected)


def test_many_positions_of_one_sequence() -> None:
    expected = gumbel([11] * 300, range(300), torch.arange(2_048))
    found = [gumbel_of_all([11], [position], 2_048, CPU) for position in range(300)]
    assert torch.equal(torch.cat(found), expected)


def test_only_small_batches_of_small_vocabularies_are_made_ahead() -> None:
    assert is_made_ahead(8, 2_048)
    assert not is_made_ahead(9, 2_048)
    assert not is_made_ahead(1, 10_000)  # a block would be one position


@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.01, "top_k": 50}])
def test_one_row_draws_what_a_large_batch_draws(settings: dict[str, float]) -> None:
    """The large batch does without noise made ahead."""
    logits = torch.randn(40, 2_048, generator=torch.Generator().manual_seed(1)) * 3
    rows = [SamplingRow(temperature=0.8, seed=index // 20, **settings) for index in range(40)]  # type: ignore[arg-type]
    positions = [100 + index % 20 for index in range(40)]
    together = draw(logits, rows, positions, num_runners_up=2)
    before = logits.clone()
    for index, row in enumerate(rows):
        alone = draw(logits[index : index + 1], [row], [positions[index]], num_runners_up=2)
        assert alone.token_ids == [together.token_ids[index]]
        assert alone.runners_up == [together.runners_up[index]]
    assert torch.equal(logits, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_each_device_has_its_own() -> None:
    for device in (CPU, torch.device("cuda", 0)):
        expected = gumbel(SEEDS, POSITIONS, torch.arange(2_048, device=device))
        assert torch.equal(gumbel_of_all(SEEDS, POSITIONS, 2_048, device), expected)
