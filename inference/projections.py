"""The matrix products of fused layers: with weights as they are, or held in half precision where that loses nothing.

A step of few tokens is bound by reading the weights. Checkpoints are mostly bfloat16 or float16, whose values float16
holds exactly once a matrix is multiplied by a power of two; they are then read in half the bytes and multiplied in
float32, by FBGEMM, which torch brings along for x86. On one core of an AMD EPYC (Zen 4), 24 matrices of 2048 x 2048,
products of 1, 2, 5, 13 and 512 rows take 8, 9, 16, 35 and 1040 ms instead of 24, 43, 67, 101 and 1141. And with AVX-512
a row comes out the same bit for bit however many there are. With AVX2 alone one or two rows, or so many that are left
over where rows go in sixes, are added up in another order, as any library may do; all others are the same too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

FLOAT32_ROUNDING = 2.0**-24
"""What rounding a number to float32 changes at most, as a share of it."""

_GREATEST_EXPONENT = 15
"""Packed matrices have their greatest weight in [2^14, 2^15), the upper end of float16."""


class Projection(Protocol):
    """y = x @ matrix + bias, for x [rows, inputs] and y [rows, outputs], float32 or what the model has.

    `of` and `into` take x / ``scale``: dividing by it costs nothing in the weights of a norm that makes x. `add_to`
    takes x.
    """

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def scale(self) -> float:
        """A power of two, so that multiplying by it rounds nothing."""
        ...

    @property
    def num_outputs(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """What the weights take."""
        ...

    def of(self, inputs: Tensor) -> Tensor: ...

    def into(self, outputs: Tensor, inputs: Tensor) -> None: ...

    def add_to(self, hidden: Tensor, inputs: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class DenseProjection:
    """Weights as they were loaded, or views of them."""

    matrix: Tensor
    """[inputs, outputs]"""
    bias: Tensor | None

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def num_outputs(self) -> int:
        return self.matrix.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.matrix.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def of(self, inputs: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(inputs, self.matrix)
        return torch.addmm(self.bias, inputs, self.matrix)

    def into(self, outputs: Tensor, inputs: Tensor) -> None:
        if self.bias is None:
            torch.mm(inputs, self.matrix, out=outputs)
        else:
            torch.addmm(self.bias, inputs, self.matrix, out=outputs)

    def add_to(self, hidden: Tensor, inputs: Tensor) -> None:
        hidden.addmm_(inputs, self.matrix)
        if self.bias is not None:
            hidden.add_(self.bias)


@dataclass(frozen=True, slots=True)
class PackedProjection:
    """Weights in float16, times ``scale``, laid out for FBGEMM."""

    packed: Any
    """torch's `LinearPackedParamsBase`, without a bias."""
    bias: Tensor | None
    scale: float
    num_outputs: int
    num_bytes: int

    @classmethod
    def make(cls, weight: Tensor, bias: Tensor | None) -> PackedProjection:
        """Of ``weight`` [outputs, inputs], for which `fits_half` holds."""
        scale = half_scale(weight)
        packed = torch.ops.quantized.linear_prepack_fp16(weight * scale, None)
        num_bytes = 2 * weight.numel() + (0 if bias is None else bias.nbytes)
        return cls(packed, bias, scale, weight.shape[0], num_bytes)

    def of(self, inputs: Tensor) -> Tensor:
        outputs = self._product(inputs)
        return outputs if self.bias is None else outputs.add_(self.bias)

    def into(self, outputs: Tensor, inputs: Tensor) -> None:
        outputs.copy_(self.of(inputs))

    def add_to(self, hidden: Tensor, inputs: Tensor) -> None:
        hidden.add_(self._product(inputs), alpha=1 / self.scale)
        if self.bias is not None:
            hidden.add_(self.bias)

    def _product(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.quantized.linear_dynamic_fp16(inputs, self.packed)
        return outputs


def packs_here() -> bool:
    """Whether this processor and this torch can run a `PackedProjection`."""
    return torch.backends.quantized.engine in ("fbgemm", "x86")


def fits_half(weight: Tensor) -> bool:
    """Whether float16 changes no output of ``weight``, times its scale, by more than float32 would round it anyway.

    By the L2 norm of each row; of rows that are smaller than most, the median's counts. True of what was stored in
    bfloat16 or float16: a bfloat16 has to be 2^-32 of the greatest weight to lose a bit.
    """
    if weight.dtype is not torch.float32:
        return False
    scaled = weight * half_scale(weight)
    errors = torch.linalg.vector_norm(scaled.half().float() - scaled, dim=-1)
    norms = torch.linalg.vector_norm(scaled, dim=-1)
    return bool((errors <= FLOAT32_ROUNDING * norms.clamp(min=float(norms.median()))).all())


def half_scale(weight: Tensor) -> float:
    """The power of two that brings the greatest weight to the upper end of float16."""
    greatest = float(weight.abs().max()) if weight.numel() else 0.0
    return math.ldexp(1.0, _GREATEST_EXPONENT - math.frexp(greatest)[1]) if 0 < greatest < math.inf else 1.0
