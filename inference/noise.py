"""Noise that is a function and not a stream: the same bits for the same (seed, stream, position, token) everywhere.

Target and drafter draw with the same noise, on different machines, in any order and batch. So the noise is an integer
hash, and this docstring is its definition, part of the published protocol:

    mix64(z):   z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9
                z ^= z >> 27;  z *= 0x94D049BB133111EB
                z ^= z >> 31                                  (all modulo 2**64, shifts logical)
    nth(h, n):  mix64(h + (n + 1) * 0x9E3779B97F4A7C15)

    bits(seed, stream, position, token) = nth(nth(nth(seed, stream), position), token)
    u      = min((bits >> 11) + 1, 2**53 - 1) / 2**53         (float64, exact, in [2**-53, 1 - 2**-53])
    gumbel = -log(-log(u))                                    (float64, in [-3.61, 36.74])

`nth(h, n)` is the n-th output of the SplitMix64 generator (Steele, Lea, Flood, OOPSLA 2014) seeded with h: each stream
has a generator of positions, each position one of tokens. Stream 0 is for drawing tokens; other uses take others.

The bits are the same on every device. The two logarithms are the device's own and may differ in the last place: that
can matter only where two candidates lie within 1e-14 of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MAX_UNIFORM_INTEGER = 2**53 - 1
_ALL_BITS = 2**64 - 1

_MANY_ROWS = 64
"""From so many on their keys are computed together; fewer are done sooner one by one (2 us each)."""


def random_bits(seeds: Sequence[int], positions: Sequence[int], tokens: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """64 random bits per row and token.

    Args:
        seeds: R integers, taken modulo 2**64.
        positions: R integers.
        tokens: int64 [C], the same for all rows, or [R, C]; its device is where the work is done.
        stream: separates independent uses of one seed.

    Returns:
        int64 [R, C], to be read as unsigned.
    """
    first = _first_states(seeds, positions, stream).to(tokens.device)
    return _mix64_(torch.add(first.unsqueeze(1), tokens, alpha=_as_int64(_GOLDEN)))


def uniform(seeds: Sequence[int], positions: Sequence[int], tokens: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Uniform numbers strictly inside (0, 1) with 53 random bits: float64 [R, C]. Arguments as `random_bits`."""
    bits = random_bits(seeds, positions, tokens, stream)
    integers = _shift_right(bits, 11, out=bits)
    return integers.add_(1).clamp_(max=_MAX_UNIFORM_INTEGER).to(torch.float64).mul_(2.0**-53)


def gumbel(seeds: Sequence[int], positions: Sequence[int], tokens: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Standard Gumbel noise: float64 [R, C]. Arguments as `random_bits`."""
    return uniform(seeds, positions, tokens, stream).log_().neg_().log_().neg_()


def _first_states(seeds: Sequence[int], positions: Sequence[int], stream: int) -> torch.Tensor:
    """What is mixed for token 0 of each row: int64 [R], on the CPU."""
    if len(seeds) < _MANY_ROWS:
        keys = [_nth(_nth(seed, stream), position) for seed, position in zip(seeds, positions, strict=True)]
        return torch.tensor([_as_int64(key + _GOLDEN) for key in keys], dtype=torch.int64)
    pairs = [(seed & _ALL_BITS, position + 1 & _ALL_BITS) for seed, position in zip(seeds, positions, strict=True)]
    of_seeds, places = torch.from_numpy(np.array(pairs, dtype=np.uint64).view(np.int64)).unbind(1)
    states = _mix64_(of_seeds + _as_int64((stream + 1) * _GOLDEN))
    return _mix64_(states.add_(places, alpha=_as_int64(_GOLDEN))).add_(_as_int64(_GOLDEN))


def _nth(h: int, n: int) -> int:
    z = (h + (n + 1) * _GOLDEN) & _ALL_BITS
    z = (z ^ (z >> 30)) * _MULTIPLIER_1 & _ALL_BITS
    z = (z ^ (z >> 27)) * _MULTIPLIER_2 & _ALL_BITS
    return z ^ (z >> 31)


def _mix64_(z: torch.Tensor) -> torch.Tensor:
    """The splitmix64 finaliser, in place: int64 multiplication wraps as uint64 does."""
    shifted = torch.empty_like(z)
    z.bitwise_xor_(_shift_right(z, 30, shifted)).mul_(_as_int64(_MULTIPLIER_1))
    z.bitwise_xor_(_shift_right(z, 27, shifted)).mul_(_as_int64(_MULTIPLIER_2))
    return z.bitwise_xor_(_shift_right(z, 31, shifted))


def _shift_right(z: torch.Tensor, num_bits: int, out: torch.Tensor) -> torch.Tensor:
    """Logical shift of int64 to ``out``: torch's own copies the sign bit, so those copies are masked away."""
    return torch.bitwise_right_shift(z, num_bits, out=out).bitwise_and_((1 << (64 - num_bits)) - 1)


def _as_int64(unsigned: int) -> int:
    """The int64 with the same 64 bits."""
    return ((unsigned + 2**63) % 2**64) - 2**63
