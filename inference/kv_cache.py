"""The memory behind the KV pool: one tensor of keys and one of values for all layers.

Shape [num_layers, num_kv_heads, num_blocks * block_size, head_dim], so that a run of consecutive blocks is a plain view
and a head's keys lie together: on a CPU, one-token attention over cold memory takes 39 us this way and 70 us with the
heads interleaved (300 positions, 3 heads). How it lies in memory is the attention backend's choice: with
`keys_by_dim` the positions of keys are innermost, which is the order in which a matrix product with a few queries reads
them (300 positions, 3 heads, 7 queries: 14 us instead of 23). A paged CUDA kernel that wants tokens outermost ("NHD")
would allocate in that order and permute to this shape; nothing else would change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from inference.kv_pool import BlockCopy

_LINE_BYTES = 64
"""Of a cache line."""


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """The shapes that every attention layer of a model shares."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def group_size(self) -> int:
        """Query heads that read the same key head."""
        return self.num_heads // self.num_kv_heads


LayerViews = tuple[torch.Tensor, ...]
"""One tensor per layer."""


class KVCache:
    """Keys and values of every layer, addressed by block."""

    def __init__(
        self,
        geometry: AttentionGeometry,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        keys_by_dim: bool = False,
    ) -> None:
        self.geometry = geometry
        self.block_size = block_size
        shape = (geometry.num_layers, geometry.num_kv_heads, num_blocks * block_size)
        # Zeros and not garbage: a masked position's value is multiplied by 0, and 0 * NaN is NaN.
        if keys_by_dim:
            size = _odd_lines(shape[2], dtype.itemsize)
            by_dim = torch.zeros(*shape[:2], geometry.key_dim, size, dtype=dtype, device=device)
            self._keys = by_dim[..., : shape[2]].transpose(2, 3)
        else:
            self._keys = torch.zeros(*shape, geometry.key_dim, dtype=dtype, device=device)
        self._values = torch.zeros(*shape, geometry.value_dim, dtype=dtype, device=device)
        self.layer_keys: LayerViews = self._keys.unbind(0)
        """Per layer [num_kv_heads, num_slots, key_dim]."""
        self.layer_keys_by_dim: LayerViews = self._keys.transpose(2, 3).unbind(0)
        """The same keys as [num_kv_heads, key_dim, num_slots]."""
        self.layer_values: LayerViews = self._values.unbind(0)

    @cached_property
    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values as numpy sees them, for a cache in float32 on a CPU: [layers, num_kv_heads, slots, dim]."""
        return self._keys.numpy(), self._values.numpy()

    @property
    def num_bytes(self) -> int:
        """Of all positions, without the line or two that dimensions of keys may lie further apart."""
        return self._keys.nbytes + self._values.nbytes

    def slots(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of slots [start, stop): [num_layers, num_kv_heads, stop - start, dim].

        Of all layers at once, to be unbound once per step: slicing in every layer of every step would cost as much as
        the attention itself.
        """
        return self._keys[:, :, start:stop], self._values[:, :, start:stop]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out what the pool's books ask for, in every layer."""
        for copy in copies:
            for memory in (self._keys, self._values):
                self._block(memory, copy.target).copy_(self._block(memory, copy.source))

    def _block(self, memory: torch.Tensor, block: int) -> torch.Tensor:
        return memory[:, :, block * self.block_size : (block + 1) * self.block_size]


def _odd_lines(size: int, itemsize: int) -> int:
    """``size`` or a little more, so that it takes an odd number of cache lines.

    A cache has a power of two of places for lines. Dimensions of keys a multiple of that apart would all have the same
    few, and a product that reads them all would push out what it is about to read.
    """
    num_lines = -(-size * itemsize // _LINE_BYTES)
    return (num_lines | 1) * _LINE_BYTES // itemsize
