"""How close two tokens' scores have to be for rounding to swap them.

A model's floating-point results depend on the order of summation, and that on how many rows are in a pass. So one pass
over K + 1 tokens and K + 1 passes over one token may give logits that differ in their last bits. Which differences
does that explain?

Model, for a dtype of unit roundoff u (half a unit in the last place, relative: 2^-8 for bfloat16, 2^-11 for float16,
2^-24 for float32):

1. A pass stores the residual stream 2 L + 1 times for L layers, and each time rounds it. The relative error is u at
   most, and u / sqrt(3) at most in the root mean square, for it is evenly spread. Sums are kept in float32 at least;
   where the dtype is float32 itself, each of the w additions of a sum over the width w rounds too. That makes
   N = 2 L + 1 roundings, or (2 L + 1) w in float32.
2. They are independent, so the last hidden state is off by u sqrt(N / 3) of its size, in a direction that has nothing
   to do with the vocabulary. Then every logit is off by about u sqrt(N / 3) s, s being the standard deviation of the
   row's logits.
3. The difference of two tokens between two passes has four such errors: its standard deviation is 2 u sqrt(N / 3) s.
   We allow three of them.
4. At the end each of the four logits is rounded to the dtype: by half a unit in the last place of its magnitude m, all
   in the worst direction together.

    bound = 6 u sqrt(N / 3) s + 2 ulp(m)

A margin within the bound is a near-tie that rounding may swap. Beyond it, something else is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

_SIGNIFICAND_BITS: Final = {"bfloat16": 8, "float16": 11, "float32": 24}
_STANDARD_DEVIATIONS: Final = 3
"""Allowed: more happen once in 370 differences, and only differences near a tie are looked at."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding does to a model's logits."""

    dtype: str
    num_layers: int
    width: int
    """Of the hidden states."""

    @property
    def unit(self) -> float:
        """u: the largest relative error of one rounding."""
        return 2.0 ** -_SIGNIFICAND_BITS[self.dtype]

    @property
    def num_roundings(self) -> int:
        """N: on the way from an embedding to the last hidden state."""
        stored = 2 * self.num_layers + 1
        return stored * self.width if self.dtype == "float32" else stored

    def bound(self, spread: float, magnitude: float) -> float:
        """The greatest margin that rounding explains, in units of logits.

        ``spread``: standard deviation of the row's logits; ``magnitude``: the greater of the two tokens', absolute.
        """
        hidden = 2 * _STANDARD_DEVIATIONS * self.unit * math.sqrt(self.num_roundings / 3) * spread
        return hidden + 2 * self._ulp(magnitude)

    def _ulp(self, magnitude: float) -> float:
        if magnitude == 0:
            return 0.0
        return 2.0 ** (math.frexp(magnitude)[1] - _SIGNIFICAND_BITS[self.dtype])
