"""A `ModelForward` whose small steps are machine code (`compiled_layers`); larger ones run as ever."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from inference.attention import AttentionStep
from inference.fused_weights import ModelWeights
from inference.matmul_attention import MatmulStep
from inference.model_forward import ModelForward
from inference.noise_ahead import gumbel_of_chains
from inference.packing import PackedBatch
from inference.sampling import Draws, RunnerUp, SamplingRow

if TYPE_CHECKING:
    from inference.compiled_arrays import Buffers, Chains, Paged

MAX_COMPILED_BYTES = 16 << 20
"""Weights of larger models, in float32, take longer to read than their operations to launch."""

MAX_COMPILED_ROWS = 64
"""What there is memory for. As many sequences with a row each still take less time than by BLAS, with the demo draft
and with one of twice its width."""

MAX_SHARED_SCORES = 12_000
"""Of a layer: positions that rows of one sequence attend to, all but the first row, for each head, added up. More are
faster by BLAS, which reads a position once for all of them: with the demo draft 13 rows behind 300 positions and 5
behind 1,000 took as long either way, with 12 heads of 16 dimensions 5 behind 500 longer."""


def is_worth_compiling(model: PreTrainedModel) -> bool:
    """Whether ``model``, in float32 on a CPU, gains from `CompiledForward`, and numba is here to compile it."""
    num_bytes = sum(weight.nbytes for weight in model.parameters())
    return (
        model.device.type == "cpu"
        and model.dtype == torch.float32
        and num_bytes <= MAX_COMPILED_BYTES
        and importlib.util.find_spec("numba") is not None
    )


class CompiledForward:
    """Steps of up to `MAX_COMPILED_ROWS` tokens by `compiled_layers`, others by the forward it is given.

    Its buffers make it fit for one thread only.
    """

    def __init__(self, model: PreTrainedModel, weights: ModelWeights, larger: ModelForward, cached: bool) -> None:
        """``weights``: those of ``model``, with `has_common_layers`. The model may be gone afterwards.

        The KV cache must not lie by dimension. ``cached``: see `compiled_layers.compiled_step`.
        """
        # not above, as numba takes half a second to import
        from inference import compiled_arrays, compiled_layers, compiled_weights

        self._layers, self._arrays = compiled_layers, compiled_arrays
        self._run_step = compiled_layers.compiled_step(cached)
        self._larger = larger
        self._num_heads = weights.num_heads
        self._eps = weights.norm.eps
        self._rule = weights.layers[0].rule
        self._matrices, self._ends = compiled_weights.of_model(model, weights)
        self._buffers = self._make_buffers()
        self._no_chains = compiled_arrays.chains([], [], np.empty((0, 0, 0)), 0, depth=0, num_best=0)

    @property
    def num_weight_bytes(self) -> int:
        """Of both ways."""
        return self._larger.num_weight_bytes + sum(array.nbytes for array in (*self._matrices, *self._ends))

    def run(self, packed: PackedBatch, step: AttentionStep) -> torch.Tensor:
        if not self._is_small(step, packed):
            return self._larger.run(packed, step)
        return torch.from_numpy(self._run(packed, step, _logit_rows(packed), self._no_chains))

    def draw_chains(
        self,
        packed: PackedBatch,
        step: AttentionStep,
        rows: Sequence[SamplingRow],
        positions: Sequence[int],
        depth: int,
        limit: int,
        num_runners_up: int,
    ) -> Draws | None:
        """See `Runtime.draw_chains`; ``positions`` are those of the first tokens drawn, and the block tables have room
        for ``depth - 1`` more. None, and nothing is done, if the step is too large.
        """
        if not self._is_small(step, packed):
            return None
        temperatures = [0.0 if row.is_greedy else row.temperature for row in rows]
        noise = np.empty((0, 0, 0))
        if any(temperatures):
            noise = gumbel_of_chains([row.seed for row in rows], positions, depth, limit).numpy()
        num_best = min(num_runners_up + 1, limit)
        chains = self._arrays.chains(positions, temperatures, noise, limit, depth=depth, num_best=num_best)
        self._run(packed, step, _logit_rows(packed), chains)
        token_ids, scores = chains.token_ids.reshape(-1, num_best), chains.scores.reshape(-1, num_best)
        gaps = scores[:, :1] - scores
        return Draws(
            token_ids[:, 0].tolist(),
            [
                list(map(RunnerUp, ids, below))
                for ids, below in zip(token_ids[:, 1:].tolist(), gaps[:, 1:].tolist(), strict=True)
            ],
        )

    def run_without_logits(self, packed: PackedBatch, step: AttentionStep) -> None:
        if self._is_small(step, packed):
            self._run(packed, step, np.empty(0, np.int64), self._no_chains)
        else:
            self._larger.run_without_logits(packed, step)

    def _is_small(self, step: AttentionStep, packed: PackedBatch) -> TypeGuard[MatmulStep]:
        num_shared = self._num_heads * sum((one.num_tokens - 1) * one.context for one in packed.sequences)
        is_small = packed.token_ids.shape[1] <= MAX_COMPILED_ROWS and num_shared <= MAX_SHARED_SCORES
        return is_small and isinstance(step, MatmulStep)

    def _run(
        self, packed: PackedBatch, step: MatmulStep, logit_rows: NDArray[np.int64], chains: Chains
    ) -> NDArray[np.float32]:
        logits = np.empty((len(logit_rows), len(self._ends.embedding)), np.float32)
        self._run_step(
            packed.token_ids[0].numpy(),
            logit_rows,
            self._matrices,
            self._ends,
            self._paged(packed, step),
            self._buffers,
            self._num_heads,
            self._eps,
            self._rule.scaling,
            logits,
            chains,
        )
        return logits

    def _paged(self, packed: PackedBatch, step: MatmulStep) -> Paged:
        tables = np.zeros((len(packed.sequences), max(len(one.blocks) for one in packed.sequences)), np.int64)
        sequences = np.empty(packed.token_ids.shape[1], np.int64)
        for index, one in enumerate(packed.sequences):
            tables[index, : len(one.blocks)] = one.blocks
            sequences[one.start : one.stop] = index
        keys, values = step.cache.arrays
        positions = packed.position_ids[0].numpy()
        window = sys.maxsize if self._rule.window is None else self._rule.window
        return self._arrays.Paged(keys, values, positions, sequences, tables, step.cache.block_size, window)

    def _make_buffers(self) -> Buffers:
        layers, matrices, size = self._layers, self._matrices, self._ends.embedding.shape[1]
        num_gates = matrices.down.shape[2]

        def rows_of(size: int) -> NDArray[np.float32]:
            return np.empty((MAX_COMPILED_ROWS, size), np.float32)

        return self._arrays.Buffers(
            hidden=rows_of(size),
            normed=rows_of(size),
            qkv=rows_of(matrices.qkv.shape[1] * layers.PANEL),
            attended=rows_of(matrices.attention_output.shape[2]),
            gate_up=rows_of(matrices.gate_up.shape[1] * layers.PANEL),
            activated=rows_of(num_gates),
            scores=np.empty(len(self._ends.cos), np.float32),
            tile=np.empty((layers.TILE_ROWS, layers.PANEL), np.float32),
        )


def _logit_rows(packed: PackedBatch) -> NDArray[np.int64]:
    return np.arange(packed.num_logits) if packed.logit_rows is None else packed.logit_rows.numpy()
