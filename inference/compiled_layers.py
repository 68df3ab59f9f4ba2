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
from typing import Any, Final, TypeVar

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from inference.compiled_arrays import Buffers, Chains, Ends, Floats, Integers, LayerMatrices, Paged, Weights

# What machine code depends on stands in this file: numba makes it anew when this one changes, and looks at no other.

_IS_WIDE: Final = bool(binding.get_host_cpu_features().get("avx512f"))

LANES: Final = 16 if _IS_WIDE else 8
"""Numbers of a vector."""

VECTORS: Final = 4
"""Of one row's sums that are held in registers."""

PANEL: Final = LANES * VECTORS
"""Outputs that are summed up together."""

TILE_ROWS: Final = 4 if _IS_WIDE else 3
"""Rows that are summed up together, so that all their sums fit into the registers."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_FAST_MATH: Final = frozenset({"reassoc", "contract", "arcp", "nsz"})
"""Sums may be taken in the order of vectors. Infinities and NaN stay what they are."""

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


def _tile_of(num_rows: int) -> Any:
    """The intrinsic ``(inputs, panel, tile)``: ``tile[r] = inputs[r] @ panel`` for ``num_rows`` rows.

    For inputs [R, I] of C order, a panel [I, PANEL] and a tile [TILE_ROWS, PANEL]. All sums stay in registers, and each
    is taken in the order of the inputs, so that a row comes out the same however many there are. Left to itself the
    compiler sums up vectors along the inputs and then adds up what is in each, which takes as long again for inputs as
    few as these.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inputs, panel, tile = (
            make_array(kind)(context, builder, argument)
            for kind, argument in zip(signature.args, arguments, strict=True)
        )
        weight, floats = signature.args[1].dtype, ir.VectorType(ir.FloatType(), LANES)
        stored = floats if weight == types.float32 else ir.VectorType(ir.HalfType(), LANES)
        zeros = ir.Constant(floats, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(VECTORS)] for _ in range(num_rows)]
        num_inputs = cgutils.unpack_tuple(builder, inputs.shape, 2)[1]
        row_bytes = cgutils.unpack_tuple(builder, inputs.strides, 2)[0]
        rows = [
            cgutils.pointer_add(builder, inputs.data, builder.mul(row_bytes, row_bytes.type(row)))
            for row in range(num_rows)
        ]
        with cgutils.for_range(builder, num_inputs) as loop:
            start = builder.mul(loop.index, loop.index.type(PANEL))
            weights = []
            for vector in range(VECTORS):
                place = builder.gep(panel.data, [builder.add(start, start.type(vector * LANES))])
                loaded = builder.load(builder.bitcast(place, stored.as_pointer()), align=weight.bitwidth // 8)
                weights.append(loaded if stored == floats else builder.fpext(loaded, floats))
            for row, of_row in zip(rows, sums, strict=True):
                spread = _spread(builder, builder.load(builder.gep(row, [loop.index])), floats)
                for one, column in zip(of_row, weights, strict=True):
                    product = builder.fmul(spread, column, flags=["contract"])
                    builder.store(builder.fadd(builder.load(one), product, flags=["contract"]), one)
        for row, of_row in enumerate(sums):
            for vector, one in enumerate(of_row):
                place = builder.gep(tile.data, [ir.IntType(64)(row * PANEL + vector * LANES)])
                builder.store(builder.load(one), builder.bitcast(place, floats.as_pointer()), align=4)
        return context.get_dummy_value()

    def tile_product(context: Any, inputs: Any, panel: Any, tile: Any) -> Any:
        return types.void(inputs, panel, tile), generate

    return intrinsic(tile_product)


def _spread(builder: Any, number: Any, vector: ir.VectorType) -> Any:
    """A vector of the same number."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)


_tile_1, _tile_2, _tile_3, _tile_4 = (_tile_of(num_rows) for num_rows in range(1, 5))


@_compiled
def _project(inputs: Floats, matrix: Weights, unscale: np.float32, adds: bool, tile: Floats, outputs: Floats) -> None:
    """inputs @ matrix * unscale, for a matrix [panels, inputs, PANEL]: read from memory once for all rows."""
    num_rows, num_outputs = outputs.shape
    for index in range(len(matrix)):
        panel, start = matrix[index], index * PANEL
        num_columns = min(PANEL, num_outputs - start)
        for row in range(0, num_rows, TILE_ROWS):
            some = inputs[row : row + TILE_ROWS]
            if len(some) == 1:
                _tile_1(some, panel, tile)
            elif len(some) == 2:
                _tile_2(some, panel, tile)
            elif len(some) == 3:
                _tile_3(some, panel, tile)
            else:
                _tile_4(some, panel, tile)
            for i in range(len(some)):
                sums, target = tile[i], outputs[row + i, start : start + num_columns]
                if adds:
                    for j in range(num_columns):
                        target[j] += sums[j] * unscale
                else:
                    for j in range(num_columns):
                        target[j] = sums[j] * unscale


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


@_compiled
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
        _project(normed, matrices.qkv[layer], unscales[0], False, buffers.tile, heads)
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
        _project(attended, matrices.attention_output[layer], unscales[1], True, buffers.tile, hidden)
        _normalise(hidden, matrices.mlp_norm[layer], eps, normed)
        _project(normed, matrices.gate_up[layer], unscales[2], False, buffers.tile, gate_up)
        _activate(gate_up, activated)
        _project(activated, matrices.down[layer], unscales[3], True, buffers.tile, hidden)
    num_logits = len(logit_rows)
    for index in range(num_logits):
        for i in range(size):
            normed[index, i] = hidden[logit_rows[index], i]
    hidden[:num_logits] = normed[:num_logits]
    _normalise(hidden[:num_logits], ends.norm, eps, normed[:num_logits])
    _project(normed[:num_logits], ends.head, ends.unscales[1], False, buffers.tile, logits)


@_compiled
def _draw(logits: Floats, row: int, depth: int, chains: Chains) -> None:
    """The best of ``logits[row]`` go to ``chains``."""
    token_ids, scores = chains.token_ids[row, depth], chains.scores[row, depth]
    temperature, num_best = chains.temperatures[row], len(token_ids)
    scores[:] = -np.inf
    token_ids[:] = 0
    for token_id in range(chains.limit):
        score = np.float64(logits[row, token_id])
        if temperature > 0:
            score = np.float64(logits[row, token_id] / temperature) + chains.noise[row, depth, token_id]
        if not score > scores[num_best - 1]:
            continue
        place = num_best - 1
        while place > 0 and score > scores[place - 1]:
            scores[place], token_ids[place] = scores[place - 1], token_ids[place - 1]
            place -= 1
        scores[place], token_ids[place] = score, token_id


def _run_chains(
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
    chains: Chains,
) -> None:
    """`_run_step`, and what is drawn behind its rows with logits, which then have to be one of each sequence.

    ``logits`` are those of the last step.
    """
    _run_step(token_ids, logit_rows, matrices, ends, paged, buffers, num_heads, eps, scaling, logits)
    num_rows, num_drawn = chains.token_ids.shape[0], chains.token_ids.shape[1]
    rows = np.arange(num_rows)
    drawn = np.empty(num_rows, np.int64)
    for depth in range(num_drawn):
        for row in range(num_rows):
            _draw(logits, row, depth, chains)
            drawn[row] = chains.token_ids[row, depth, 0]
        if depth + 1 < num_drawn:
            here = Paged(
                paged.keys,
                paged.values,
                chains.positions + depth,
                rows,
                paged.tables,
                paged.block_size,
                paged.window,
            )
            _run_step(drawn, rows, matrices, ends, here, buffers, num_heads, eps, scaling, logits)


def compiled_step(cached: bool) -> Callable[..., None]:
    """`_run_chains` as machine code, which is made when it is first called.

    ``cached``: from disk, or kept there for the next time, beside this file or in the user's cache, if either can be
    written. What is damaged there raises when it is first called.
    """
    step: Callable[..., None] = numba.njit(**_OPTIONS)(_run_chains)
    if cached:
        with suppress(RuntimeError):  # there is no place for it
            step = numba.njit(cache=True, **_OPTIONS)(_run_chains)
    return step
