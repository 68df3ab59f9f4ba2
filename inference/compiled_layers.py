"""A whole forward pass of a small Llama-like model over the paged cache, compiled to machine code by numba.

A draft model is so small that launching operations costs several times what they compute: two layers of width 192 with
three rows took 0.75 ms by `FusedForward` on one core of an Intel Xeon (Sapphire Rapids), where the products are 0.2.
Here nothing is launched, weights may be float16, and block tables are read as they are, so what branches share is read
in place.

Compiling takes some seconds once; numba keeps the result on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Integers: TypeAlias = NDArray[np.int64]
Weights: TypeAlias = NDArray[np.float32] | NDArray[np.uint16]
"""Float32, or the bits of float16 numbers, of which numba knows nothing on a CPU."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_FAST_MATH: Final = frozenset({"reassoc", "contract", "arcp", "nsz"})
"""Sums may be taken in the order of vectors. Infinities and NaN stay what they are."""


class LayerMatrices(NamedTuple):
    """Weights of all L layers, matrices as [L, outputs, inputs]."""

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
    """[vocab_size, hidden_size], as is `head`; which may be the same."""
    norm: Floats
    head: Weights
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


_OPTIONS: Final[dict[str, Any]] = {"fastmath": set(_FAST_MATH), "error_model": "numpy", "nogil": True}


def _compiled(function: FunctionT) -> FunctionT:
    """A part of the whole, compiled along with it."""
    found: FunctionT = numba.njit(**_OPTIONS)(function)
    return found


def _widen(context: Any, weight: Any) -> Any:
    """How a weight becomes float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if weight == types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(weight), generate


_widened: Any = intrinsic(_widen)


@_compiled
def _normalise(hidden: Floats, weight: Floats, eps: float, normed: Floats) -> None:
    """RMS norm of each row."""
    num_rows, size = hidden.shape[0], hidden.shape[1]
    for row in range(num_rows):
        squares = np.float32(0)
        for i in range(size):
            squares += hidden[row, i] * hidden[row, i]
        factor = np.float32(1 / math.sqrt(squares / size + eps))
        for i in range(size):
            normed[row, i] = hidden[row, i] * factor * weight[i]


@_compiled
def _project(inputs: Floats, matrix: Weights, unscale: np.float32, adds: bool, outputs: Floats) -> None:
    """inputs @ matrix.T * unscale, for a matrix [outputs, inputs]: read from memory once for all rows."""
    num_rows, num_inputs = inputs.shape[0], inputs.shape[1]
    for output in range(matrix.shape[0]):
        for row in range(0, num_rows - 1, 2):  # two at a time: a weight is widened once for them
            first, second = np.float32(0), np.float32(0)
            for i in range(num_inputs):
                weight = _widened(matrix[output, i])
                first += inputs[row, i] * weight
                second += inputs[row + 1, i] * weight
            outputs[row, output] = first * unscale + outputs[row, output] if adds else first * unscale
            outputs[row + 1, output] = second * unscale + outputs[row + 1, output] if adds else second * unscale
        if num_rows % 2:
            row, total = num_rows - 1, np.float32(0)
            for i in range(num_inputs):
                total += inputs[row, i] * _widened(matrix[output, i])
            outputs[row, output] = total * unscale + outputs[row, output] if adds else total * unscale


@_compiled
def _rotate(heads: Floats, num_turned: int, positions: Integers, cos: Floats, sin: Floats) -> None:
    """Turns the first heads of each row, queries and keys, by its position: [R, all heads * head_dim]."""
    head_dim = cos.shape[1]
    half = head_dim // 2
    for row in range(heads.shape[0]):
        position = positions[row]
        for head in range(num_turned):
            for i in range(half):
                first, second = head * head_dim + i, head * head_dim + half + i
                x, y = heads[row, first], heads[row, second]
                heads[row, first] = x * cos[position, i] - y * sin[position, i]
                heads[row, second] = y * cos[position, half + i] + x * sin[position, half + i]


@_compiled
def _store(heads: Floats, num_heads: int, layer: int, paged: Paged) -> None:
    """New keys and values of all rows go to their slots."""
    keys, values = paged.keys[layer], paged.values[layer]
    num_kv_heads, head_dim = keys.shape[0], keys.shape[2]
    for row in range(heads.shape[0]):
        position = paged.positions[row]
        block = paged.tables[paged.sequences[row], position // paged.block_size]
        slot = block * paged.block_size + position % paged.block_size
        for head in range(num_kv_heads):
            key, value = (num_heads + head) * head_dim, (num_heads + num_kv_heads + head) * head_dim
            for i in range(head_dim):
                keys[head, slot, i] = heads[row, key + i]
                values[head, slot, i] = heads[row, value + i]


@_compiled
def _attend(
    query: Floats,
    keys: Floats,
    values: Floats,
    table: Integers,
    block_size: int,
    first: int,
    stop: int,
    scaling: float,
    scores: Floats,
    attended: Floats,
) -> None:
    """One head of one row over positions [first, stop): ``query`` [head_dim], keys and values [num_slots, head_dim]."""
    head_dim = query.shape[0]
    greatest = np.float32(-np.inf)
    for block in range(first // block_size, (stop - 1) // block_size + 1):
        start = block * block_size
        offset = table[block] * block_size - start
        for position in range(max(first, start), min(stop, start + block_size)):
            total = np.float32(0)
            for i in range(head_dim):
                total += query[i] * keys[offset + position, i]
            scores[position] = total * np.float32(scaling)
            greatest = max(greatest, scores[position])
    total_weight = np.float32(0)
    for position in range(first, stop):
        scores[position] = np.float32(math.exp(scores[position] - greatest))
        total_weight += scores[position]
    for i in range(head_dim):
        attended[i] = np.float32(0)
    for block in range(first // block_size, (stop - 1) // block_size + 1):
        start = block * block_size
        offset = table[block] * block_size - start
        position, end = max(first, start), min(stop, start + block_size)
        while position + 3 < end:  # four at a time: the sums are loaded and stored once for them
            slot = offset + position
            a, b, c, d = scores[position], scores[position + 1], scores[position + 2], scores[position + 3]
            for i in range(head_dim):
                attended[i] += (a * values[slot, i] + b * values[slot + 1, i]) + (
                    c * values[slot + 2, i] + d * values[slot + 3, i]
                )
            position += 4
        for last in range(position, end):
            for i in range(head_dim):
                attended[i] += scores[last] * values[offset + last, i]
    for i in range(head_dim):
        attended[i] /= total_weight


@_compiled
def _activate(gate_up: Floats, activated: Floats) -> None:
    """silu(gate) * up"""
    size = activated.shape[1]
    for row in range(activated.shape[0]):
        for i in range(size):
            gate = gate_up[row, i]
            activated[row, i] = gate / (np.float32(1) + np.float32(math.exp(-gate))) * gate_up[row, size + i]


def _run_step(
    token_ids: Integers,
    logit_rows: Integers,
    matrices: LayerMatrices,
    ends: Ends,
    paged: Paged,
    buffers: Buffers,
    num_heads: int,
    eps: float,
    scaling: float,
    logits: Floats,
) -> None:
    """The R tokens' keys and values go to the cache, and ``logits`` [N, vocab_size] are those of ``logit_rows`` [N]."""
    num_rows, size = len(token_ids), ends.embedding.shape[1]
    num_layers, num_kv_heads, head_dim = paged.keys.shape[0], paged.keys.shape[1], paged.keys.shape[3]
    hidden, normed = buffers.hidden[:num_rows], buffers.normed[:num_rows]
    heads, attended = buffers.qkv[:num_rows], buffers.attended[:num_rows]
    gate_up, activated = buffers.gate_up[:num_rows], buffers.activated[:num_rows]
    for row in range(num_rows):
        for i in range(size):
            hidden[row, i] = _widened(ends.embedding[token_ids[row], i]) * ends.unscales[0]
    for layer in range(num_layers):
        unscales = matrices.unscales[layer]
        _normalise(hidden, matrices.input_norm[layer], eps, normed)
        _project(normed, matrices.qkv[layer], unscales[0], False, heads)
        _rotate(heads, num_heads + num_kv_heads, paged.positions, ends.cos, ends.sin)
        _store(heads, num_heads, layer, paged)
        for row in range(num_rows):
            table, stop = paged.tables[paged.sequences[row]], paged.positions[row] + 1
            first = max(0, stop - paged.window)
            for head in range(num_heads):
                kv_head = head * num_kv_heads // num_heads
                begin, end = head * head_dim, (head + 1) * head_dim
                _attend(
                    heads[row, begin:end],
                    paged.keys[layer, kv_head],
                    paged.values[layer, kv_head],
                    table,
                    paged.block_size,
                    first,
                    stop,
                    scaling,
                    buffers.scores,
                    attended[row, begin:end],
                )
        _project(attended, matrices.attention_output[layer], unscales[1], True, hidden)
        _normalise(hidden, matrices.mlp_norm[layer], eps, normed)
        _project(normed, matrices.gate_up[layer], unscales[2], False, gate_up)
        _activate(gate_up, activated)
        _project(activated, matrices.down[layer], unscales[3], True, hidden)
    num_logits = len(logit_rows)
    for index in range(num_logits):
        for i in range(size):
            normed[index, i] = hidden[logit_rows[index], i]
    hidden[:num_logits] = normed[:num_logits]
    _normalise(hidden[:num_logits], ends.norm, eps, normed[:num_logits])
    _project(normed[:num_logits], ends.head, ends.unscales[1], False, logits)


def compiled_step(cached: bool) -> Callable[..., None]:
    """`_run_step` as machine code, which is made when it is first called.

    ``cached``: from disk, or kept there for the next time, beside this file or in the user's cache, if either can be
    written. What is damaged there raises when it is first called.
    """
    step: Callable[..., None] = numba.njit(**_OPTIONS)(_run_step)
    if cached:
        with suppress(RuntimeError):  # there is no place for it
            step = numba.njit(cache=True, **_OPTIONS)(_run_step)
    return step
