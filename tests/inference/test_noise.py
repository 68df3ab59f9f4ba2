"""The noise is a published formula: checked against a second implementation, golden values, and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inference import gumbel, random_bits, uniform

U64 = np.uint64


def mix64(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return z ^ (z >> U64(31))


def nth(h: np.ndarray, n: np.ndarray) -> np.ndarray:
    return mix64(h + (n + U64(1)) * U64(0x9E3779B97F4A7C15))


def bits_by_numpy(seeds: list[int], positions: list[int], tokens: np.ndarray, stream: int) -> np.ndarray:
    """The formula of `inference/noise.py`, in uint64."""
    keys = nth(nth(np.array(seeds, dtype=U64), np.array([stream], dtype=U64)), np.array(positions, dtype=U64))
    return nth(keys[:, None], tokens.astype(U64))


SEEDS = [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0, 7]
POSITIONS = [0, 1, 2**31, 5, 1_000_000, 131_071]


@pytest.mark.parametrize("times", [1, 4, 50])
@pytest.mark.parametrize("stream", [0, 1, 2**40])
def test_bits_equal_an_independent_implementation(stream: int, times: int) -> None:
    got = random_bits(SEEDS * times, POSITIONS * times, torch.arange(500), stream)
    expected = bits_by_numpy(SEEDS * times, POSITIONS * times, np.arange(500), stream)
    assert np.array_equal(got.numpy().view(U64), expected)


def test_golden_values() -> None:
    """Published in docs/protocol.md: changing them changes every seeded output."""
    got = random_bits([0, 42, 2**64 - 1], [0, 7, 1000], torch.tensor([0, 1, 2047]))
    assert [[f"{value:016x}" for value in row] for row in got.numpy().view(U64).tolist()] == GOLDEN_BITS
    assert gumbel([42], [7], torch.tensor([0, 1, 2047]))[0].tolist() == pytest.approx(GOLDEN_GUMBEL, abs=1e-14)


GOLDEN_BITS = [
    ["238275bc38fcbe91", "f89a2566b5822c54", "33100e2827001763"],
    ["020a28ed9e2b2bc4", "17e03160b6345c52", "a5d4d3566df597dd"],
    ["e8d19d41e189851c", "6597c7229ca8129b", "af332d0764518554"],
]
GOLDEN_GUMBEL = [-1.575339321878385, -0.8638658504094356, 0.8342358855476958]


def test_first_outputs_are_splitmix64() -> None:
    """The innermost generator is the published SplitMix64: these are its first outputs for seed 1234567."""
    outputs = nth(np.array([1234567], dtype=U64)[:, None], np.arange(3).astype(U64))
    assert outputs[0].tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_seeds_are_taken_modulo_2_64() -> None:
    tokens = torch.arange(10)
    for times in (1, 100):
        expected = random_bits([2**64 - 1], [3], tokens).expand(times, -1)
        assert torch.equal(random_bits([-1] * times, [3] * times, tokens), expected)
        assert torch.equal(random_bits([2**65 - 1] * times, [3] * times, tokens), expected)


@pytest.mark.parametrize("times", [1, 100])
def test_each_row_has_a_seed_and_a_position(times: int) -> None:
    with pytest.raises(ValueError, match="zip"):
        random_bits([1, 2] * times, [3] * times, torch.arange(10))


def test_token_subsets_have_the_same_noise() -> None:
    everything = gumbel([3, 4], [10, 11], torch.arange(100))
    chosen = torch.tensor([[5, 99, 0], [7, 7, 42]])
    assert torch.equal(gumbel([3, 4], [10, 11], chosen), everything.gather(1, chosen))


def test_rows_are_independent_of_the_batch() -> None:
    for times in (1, 20):
        together = gumbel(SEEDS * times, POSITIONS * times, torch.arange(50))
        for row, (seed, position) in enumerate(zip(SEEDS * times, POSITIONS * times, strict=True)):
            assert torch.equal(together[row : row + 1], gumbel([seed], [position], torch.arange(50)))


def test_extreme_bits_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([[0, -1, (1 << 11) - 1, -(1 << 11)]])  # unsigned: lowest, highest, and their buckets
    monkeypatch.setattr("inference.noise.random_bits", lambda *arguments: extremes.clone())
    numbers = uniform([0], [0], torch.arange(4))
    assert numbers[0].tolist() == [2.0**-53, 1 - 2.0**-53, 2.0**-53, 1 - 2.0**-53]
    noise = gumbel([0], [0], torch.arange(4))
    assert noise.min() == pytest.approx(-3.60, abs=0.01)
    assert noise.max() == pytest.approx(36.74, abs=0.01)


def ks_distance(sample: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance to the uniform distribution, times sqrt(n)."""
    ordered, n = np.sort(sample), len(sample)
    above, below = np.arange(1, n + 1) / n - ordered, ordered - np.arange(n) / n
    return float(max(above.max(), below.max()) * np.sqrt(n))


AXES = {
    "tokens": uniform([5], [9], torch.arange(40_000)),
    "positions": uniform([5] * 40_000, range(40_000), torch.tensor([17])),
    "seeds": uniform(range(40_000), [3] * 40_000, torch.tensor([17])),
    "streams": torch.cat([uniform([5], [9], torch.tensor([17]), stream) for stream in range(4_000)]),
}


@pytest.mark.parametrize("axis", AXES)
def test_uniform_along_every_axis(axis: str) -> None:
    sample = AXES[axis].numpy().ravel()
    assert ks_distance(sample) < 1.95  # p = 0.001
    assert ks_distance(sample * 1000 % 1) < 1.95  # the lower bits too


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbours_are_uncorrelated(axis: str, lag: int) -> None:
    sample = AXES[axis].numpy().ravel()
    correlation = np.corrcoef(sample[:-lag], sample[lag:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(sample))


def test_position_and_token_are_not_interchangeable() -> None:
    square = uniform([5] * 300, range(300), torch.arange(300)).numpy()
    assert len(np.unique(square)) == 300 * 300
    assert abs(np.corrcoef(square.ravel(), square.T.ravel())[0, 1]) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_bits_on_a_gpu() -> None:
    tokens = torch.arange(50_000)
    on_gpu = random_bits(SEEDS, POSITIONS, tokens.cuda(), 3)
    assert torch.equal(on_gpu.cpu(), random_bits(SEEDS, POSITIONS, tokens, 3))
    noise = gumbel(SEEDS, POSITIONS, tokens.cuda())
    torch.testing.assert_close(noise.cpu(), gumbel(SEEDS, POSITIONS, tokens), rtol=0, atol=1e-13)
