"""Small steps in a few fixed sizes: on CUDA each is recorded once and replayed as one launch.

A GPU computes a decode or verify step faster than Python can launch its operations, twenty a layer. A CUDA graph
launches them all at once, if neither shapes nor addresses ever change. So a step is padded to the next size that was
recorded, and everything that differs from step to step is data in one tensor of integers: tokens, positions, where
keys go, and the block tables of all sequences laid end to end. Every row looks at all of these blocks through a mask
that is computed on the device; steps for which that would be a waste are not recorded, and run as before.

On one H100, bfloat16, a step of 7 tokens after 300 takes 3.6 ms instead of 22 (11M parameters, 56 layers), 2.4 instead
of 8.9 (1B, 16 layers) and 8.4 instead of 10.4 (8B, 32 layers).

Rows that pad a step repeat its last row, so they write what is written anyway. Blocks that pad it belong to nobody.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from inference.attention import LayerRule
from inference.fused_forward import FusedForward
from inference.kv_cache import KVCache
from inference.kv_pool import KVPool
from inference.packing import PackedBatch
from inference.runtime import Chunk
from inference.sdpa_attention import attend_by_products, attend_masked

_NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64)
_NUM_POSITIONS = tuple(256 << doubling for doubling in range(8))
_MAX_SCORES = 1 << 19
"""Tokens times positions of the largest step: beyond it, attending to the others' blocks costs more than launches."""

_NOBODY = -1

_MIN_POSITIONS_FOR_PRODUCTS = 1024
_MIN_POSITIONS_PER_TOKEN_FOR_PRODUCTS = 128
"""Few rows against many positions: two matrix products read the keys with the whole GPU, the fused kernel that takes a
mask with one block of threads for each head (8B model, one H100, 1 token after 2,000: a step takes 8.9 ms, not 9.4)."""

Recorder = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
"""Takes a computation on tensors that stay where they are, and gives back what repeats it."""


class StepSize(NamedTuple):
    num_tokens: int
    num_blocks: int


def step_sizes(num_blocks: int, block_size: int) -> Iterator[StepSize]:
    """What is worth recording for a pool of `num_blocks`; the largest first, so that the others fit into its memory."""
    largest = num_blocks * block_size
    num_useful = bisect_left(_NUM_POSITIONS, largest) + 1
    for num_positions in reversed(_NUM_POSITIONS[:num_useful]):
        for num_tokens in reversed(_NUM_TOKENS):
            if num_tokens * num_positions <= _MAX_SCORES:
                yield StepSize(num_tokens, -(-num_positions // block_size))


def _size_for(num_tokens: int, num_positions: int, block_size: int) -> StepSize | None:
    """The next larger of both; None beyond the largest."""
    token_index, position_index = bisect_left(_NUM_TOKENS, num_tokens), bisect_left(_NUM_POSITIONS, num_positions)
    if token_index == len(_NUM_TOKENS) or position_index == len(_NUM_POSITIONS):
        return None
    return StepSize(_NUM_TOKENS[token_index], -(-_NUM_POSITIONS[position_index] // block_size))


class StepGraphs:
    """A model's steps in fixed sizes, over one KV cache.

    Made before the cache holds anything, as recording writes to it.
    """

    def __init__(self, forward: FusedForward, cache: KVCache, num_blocks: int, recorder: Recorder) -> None:
        self._steps = {
            size: _RecordedStep(size, forward, cache, recorder) for size in step_sizes(num_blocks, cache.block_size)
        }

    def run(self, batch: Sequence[Chunk], pool: KVPool) -> torch.Tensor | None:
        """As `Runtime.forward`, for a batch whose growth `pool` has granted; None if no recorded step fits."""
        num_tokens = sum(len(chunk.token_ids) for chunk in batch)
        num_blocks = sum(len(pool.blocks(chunk.sequence)) for chunk in batch)
        size = _size_for(num_tokens, num_blocks * pool.block_size, pool.block_size)
        step = None if size is None else self._steps.get(size)
        return None if step is None else step.run(_contents(batch, pool))


@dataclass(frozen=True, slots=True)
class _Contents:
    """One step as numbers."""

    rows: list[tuple[int, int, int, int]]
    """Token, position, slot of its key, sequence (counted within the step)."""
    blocks: list[tuple[int, int, int]]
    """Block, position of its first slot, sequence."""
    logit_rows: list[int]


def _contents(batch: Sequence[Chunk], pool: KVPool) -> _Contents:
    contents = _Contents([], [], [])
    size = pool.block_size
    for owner, chunk in enumerate(batch):
        blocks, context = pool.blocks(chunk.sequence), pool.length(chunk.sequence)
        for position, token_id in enumerate(chunk.token_ids, context - len(chunk.token_ids)):
            slot = blocks[position // size] * size + position % size
            contents.rows.append((token_id, position, slot, owner))
        contents.blocks.extend((block, index * size, owner) for index, block in enumerate(blocks))
        contents.logit_rows.extend(range(len(contents.rows) - chunk.num_logits, len(contents.rows)))
    return contents


class _RecordedStep:
    """One size."""

    def __init__(self, size: StepSize, forward: FusedForward, cache: KVCache, recorder: Recorder) -> None:
        self._size = size
        # Rows, then blocks, then logit rows, in one tensor: one copy to the device.
        rows_end = 4 * size.num_tokens
        blocks_end = rows_end + 3 * size.num_blocks
        device = cache.layer_keys[0].device
        self._numbers = torch.zeros(blocks_end + size.num_tokens, dtype=torch.int64, device=device)
        rows = self._numbers[:rows_end].view(size.num_tokens, 4)
        blocks = self._numbers[rows_end:blocks_end].view(size.num_blocks, 3)
        logit_rows = self._numbers[blocks_end:]
        inputs = _Inputs(*rows.unbind(1), *blocks.unbind(1))

        def compute() -> torch.Tensor:
            packed = PackedBatch(
                inputs.token_ids.unsqueeze(0), inputs.positions.unsqueeze(0), logit_rows, size.num_tokens, ()
            )
            return forward.run(packed, _FixedStep(size, inputs, cache))

        self._replay = recorder(compute)

    def run(self, contents: _Contents) -> torch.Tensor:
        num_logits = len(contents.logit_rows)
        rows = contents.rows + [contents.rows[-1]] * (self._size.num_tokens - len(contents.rows))
        blocks = contents.blocks + [(0, 0, _NOBODY)] * (self._size.num_blocks - len(contents.blocks))
        numbers = [number for entry in (*rows, *blocks) for number in entry]
        numbers += contents.logit_rows + [0] * (self._size.num_tokens - num_logits)
        self._numbers.copy_(torch.tensor(numbers))
        return self._replay()[:num_logits].clone()  # the next replay writes over it


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What differs from step to step, on the device; all int64. T rows, B blocks."""

    token_ids: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    slots: torch.Tensor
    row_owners: torch.Tensor
    blocks: torch.Tensor
    """[B]"""
    first_positions: torch.Tensor
    block_owners: torch.Tensor


class _FixedStep:
    """An `AttentionStep` whose shapes depend on T and B alone."""

    def __init__(self, size: StepSize, inputs: _Inputs, cache: KVCache) -> None:
        self._attend = _way_for(size.num_tokens, size.num_blocks * cache.block_size)
        self._cache = cache
        self._group_size = cache.geometry.group_size
        self._slots = inputs.slots
        self._positions = inputs.positions.unsqueeze(1)
        within = torch.arange(cache.block_size, device=inputs.blocks.device)
        self._key_slots = (inputs.blocks.unsqueeze(1) * cache.block_size + within).flatten()
        self._key_positions = (inputs.first_positions.unsqueeze(1) + within).flatten()
        owners = inputs.block_owners.repeat_interleave(cache.block_size, output_size=len(self._key_slots))
        self._is_seen = (owners == inputs.row_owners.unsqueeze(1)) & (self._key_positions <= self._positions)
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: LayerRule
    ) -> torch.Tensor:
        layer_keys, layer_values = self._cache.layer_keys[layer], self._cache.layer_values[layer]
        layer_keys.index_copy_(1, self._slots, key[0])
        layer_values.index_copy_(1, self._slots, value[0])
        keys = layer_keys.index_select(1, self._key_slots).unsqueeze(0)
        values = layer_values.index_select(1, self._key_slots).unsqueeze(0)
        _, num_heads, num_tokens, key_dim = query.shape
        folded = query.reshape(1, num_heads // self._group_size, self._group_size * num_tokens, key_dim)
        output = self._attend(folded, keys, values, self._mask(rule.window, query.dtype), rule)
        return output.reshape(1, num_heads, num_tokens, values.shape[-1]).transpose(1, 2)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """To be added to scores: [group_size * T, positions]."""
        if window not in self._masks:
            is_seen = self._is_seen
            if window is not None:
                is_seen = is_seen & (self._key_positions > self._positions - window)
            mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
            mask.masked_fill_(~is_seen, float("-inf"))
            self._masks[window] = mask.repeat(self._group_size, 1)
        return self._masks[window]


_Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, LayerRule], torch.Tensor]


def _way_for(num_tokens: int, num_positions: int) -> _Attend:
    least = max(_MIN_POSITIONS_FOR_PRODUCTS, _MIN_POSITIONS_PER_TOKEN_FOR_PRODUCTS * num_tokens)
    return attend_by_products if num_positions >= least else attend_masked


class CudaRecorder:
    """A `Recorder` of CUDA graphs. They share memory, as only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        with torch.cuda.device(self._device):
            self._warm_up(compute)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    @staticmethod
    def _warm_up(compute: Callable[[], torch.Tensor]) -> None:
        """Libraries choose kernels and make workspaces at the first call, which must not be recorded."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream().wait_stream(side)
