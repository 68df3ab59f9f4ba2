"""What `compiled_layers` computes with: weights, where a step's rows stand in the cache, and memory to work in.

Matrices lie in panels, ``[panels, inputs, PANEL]``: the `compiled_layers.PANEL` outputs of a panel side by side for
each input, since a row's sums are held in registers for so many outputs at once. What the last panel has too many of is
zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Integers: TypeAlias = NDArray[np.int64]
Weights: TypeAlias = NDArray[np.float32] | NDArray[np.uint16]
"""Float32, or the bits of float16 numbers, of which numba knows nothing on a CPU."""


class LayerMatrices(NamedTuple):
    """Weights of all L layers, matrices as [L, panels, inputs, PANEL]."""

    input_norm: Floats
    """[L, hidden_size], as is `mlp_norm`."""
    qkv: Weights
    attention_output: Weights
    mlp_norm: Floats
    gate_up: Weights
    down: Weights
    unscales: Floats
    """[L, 4], by what each layer's matrices, in the order in which they run, are to be multiplied."""


class Ends(NamedTuple):
    """What comes before and after the layers."""

    embedding: Weights
    """[vocab_size, hidden_size]"""
    norm: Floats
    head: Weights
    """[panels, hidden_size, PANEL]"""
    unscales: Floats
    """[2], of embedding and head."""
    cos: Floats
    """[max_context, head_dim]"""
    sin: Floats


class Paged(NamedTuple):
    """Where the step's R rows stand in the cache."""

    keys: Floats
    """[L, num_kv_heads, num_slots, head_dim], as are the values."""
    values: Floats
    positions: Integers
    """[R]"""
    sequences: Integers
    """[R], rows of `tables`."""
    tables: Integers
    """[S, blocks], the block table of each sequence."""
    block_size: int
    window: int
    """A row sees itself and the ``window - 1`` positions before it."""


class Chains(NamedTuple):
    """How each of the step's N rows with logits goes on: ``depth`` tokens, each drawn behind the one before."""

    positions: Integers
    """[N], of the first token drawn."""
    temperatures: Floats
    """[N]; 0 takes the best score."""
    noise: NDArray[np.float64]
    """[N, depth, limit], added to logits over temperature; [0, 0, 0] where all temperatures are 0."""
    limit: int
    """Only ids below it are drawn."""
    token_ids: Integers
    """[N, depth, best], to be written: those with the best scores, best first, of equals the lowest id. Without depth
    nothing is drawn."""
    scores: NDArray[np.float64]
    """[N, depth, best], to be written: theirs."""


class Buffers(NamedTuple):
    """Memory of one layer for at least R rows."""

    hidden: Floats
    normed: Floats
    """[R, hidden_size], as is `hidden`."""
    qkv: Floats
    attended: Floats
    gate_up: Floats
    activated: Floats
    """[R, outputs of the gate]"""
    scores: Floats
    """[max_context]"""
    tile: Floats
    """[TILE_ROWS, PANEL]"""


def chains(
    positions: Sequence[int],
    temperatures: Sequence[float],
    noise: NDArray[np.float64],
    limit: int,
    *,
    depth: int,
    num_best: int,
) -> Chains:
    """With room for ``depth`` times the ``num_best`` best tokens of each row."""
    shape = (len(positions), depth, num_best)
    return Chains(
        np.array(positions, np.int64),
        np.array(temperatures, np.float32),
        noise,
        limit,
        np.empty(shape, np.int64),
        np.empty(shape, np.float64),
    )
