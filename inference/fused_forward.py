"""The layers of Llama-like models in as few operations as torch allows: about 18 a layer, where transformers takes 60.

On a small model, and on any model on a GPU, launching operations costs more than what they compute: 24 layers of
width 192 on one core take 9.5 ms a token by transformers' layers and 3.8 ms here, of which 1.7 ms are the matrix
products. So:

- matrices that meet the same input are one (`fused_weights`);
- buffers and all their views are made once for a number of tokens and reused, results are written into them in place;
- what depends on positions alone is looked up once per step;
- shapes depend on the number of tokens only, never on values, and nothing is read back: a step can be captured in a
  CUDA graph as far as its attention can.

The result is that of transformers' layers up to rounding, which `fused_choice` checks when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from inference.attention import AttentionStep
from inference.fused_weights import LayerWeights, ModelWeights, Norm
from inference.matmul_attention import MatmulStep
from inference.packing import PackedBatch
from inference.projections import DenseProjection, PackedProjection
from inference.read_plan import ReadPlan
from inference.scripted_layers import script_layers

_MAX_KEPT_TOKENS = 64
"""Buffers of steps up to this size are kept; larger ones, prefills, pay for making theirs."""


class FusedForward:
    """A `ModelForward` over `ModelWeights`. Its buffers make it fit for one thread only."""

    def __init__(self, weights: ModelWeights) -> None:
        self._weights = weights
        self._buffers: dict[int, _Buffers] = {}
        on_cpu = weights.device.type == "cpu"
        self._make_norm = _MirrorNorm if on_cpu else _KernelNorm
        half = weights.head_dim // 2
        self._cos = weights.cos.unsqueeze(1)  # [max_context, 1, head_dim]
        self._half_sin = weights.sin[:, :half].unsqueeze(1)

        self._scripted = script_layers() if on_cpu and weights.has_common_layers else None
        self._norms = [norm.twice for layer in weights.layers for norm in (layer.input_norm, layer.mlp_norm)]
        projections = weights.projections
        self._matrices = [one.matrix for one in projections if isinstance(one, DenseProjection)]
        self._packed = [one.packed for one in projections if isinstance(one, PackedProjection)]
        self._unscales = [1 / one.scale for one in projections]

    @property
    def num_weight_bytes(self) -> int:
        return self._weights.num_bytes

    def run(self, packed: PackedBatch, step: AttentionStep) -> torch.Tensor:
        buffers = self._run_layers(packed, step)
        if packed.logit_rows is None:
            normed = buffers.norm.of(self._weights.norm)
        else:
            normed = self._make_norm.once(buffers.hidden.index_select(0, packed.logit_rows), self._weights.norm)
        return self._weights.head.of(normed).float()

    def run_without_logits(self, packed: PackedBatch, step: AttentionStep) -> None:
        self._run_layers(packed, step)

    def _run_layers(self, packed: PackedBatch, step: AttentionStep) -> _Buffers:
        """In `hidden` are the states after the last layer, not yet normed, valid until the next call."""
        buffers = self._buffers_for(packed.token_ids.shape[1])
        positions = packed.position_ids[0]
        cos, sin = self._cos.index_select(0, positions), self._half_sin.index_select(0, positions)
        hidden, normed = buffers.hidden, buffers.norm
        hidden.copy_(self._weights.embedding.index_select(0, packed.token_ids[0]))
        if self._scripted is not None and isinstance(step, MatmulStep) and isinstance(normed, _MirrorNorm):
            plan = step.plan_reads(self._weights.layers[0].rule, hidden.dtype)
            if plan is not None:
                self._run_scripted(self._scripted, plan, buffers, normed, cos, sin)
                return buffers
        for index, layer in enumerate(self._weights.layers):
            self._rotate(normed.of(layer.input_norm), layer, buffers, cos, sin)
            attended = step.attend(index, buffers.query, buffers.key, buffers.value, layer.rule)
            layer.attention_output.add_to(hidden, attended.reshape(hidden.shape[0], -1))
            layer.gate_up.into(buffers.gate_up, normed.of(layer.mlp_norm))
            layer.down.add_to(hidden, functional.silu(buffers.gate).mul_(buffers.up))
        return buffers

    def _run_scripted(
        self,
        scripted: Callable[..., None],
        plan: ReadPlan,
        buffers: _Buffers,
        norm: _MirrorNorm,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        layer = self._weights.layers[0]
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # there is nothing left to fuse
            scripted(
                *(norm.both, norm.hidden, norm.mirrored),
                *(buffers.qkv, buffers.unrotated, buffers.unrotated_first, buffers.unrotated_second),
                *(buffers.rotated, buffers.rotated_first, buffers.rotated_second),
                *(buffers.query[0], buffers.key[0], buffers.value[0]),
                *(buffers.gate_up, buffers.gate, buffers.up, cos, sin),
                *(self._norms, self._matrices, self._packed, self._unscales),
                *(plan.keys, plan.keys_by_dim, plan.values, plan.first_new, plan.new_slots),
                *(plan.run_starts, plan.run_lengths, plan.masks, plan.no_mask),
                *(plan.starts, plan.first_runs),
                *(layer.input_norm.eps, layer.rule.scaling),
            )

    @staticmethod
    def _rotate(
        normed: torch.Tensor, layer: LayerWeights, buffers: _Buffers, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """Queries, keys and values; queries and keys turned by their positions."""
        layer.qkv.into(buffers.qkv, normed)
        if layer.query_norm is not None and layer.key_norm is not None:
            _norm_heads(buffers.unrotated_query, layer.query_norm)
            _norm_heads(buffers.unrotated_key, layer.key_norm)
        torch.mul(buffers.unrotated, cos, out=buffers.rotated)
        buffers.rotated_first.addcmul_(buffers.unrotated_second, sin, value=-1)
        buffers.rotated_second.addcmul_(buffers.unrotated_first, sin)

    def _buffers_for(self, num_tokens: int) -> _Buffers:
        buffers = self._buffers.get(num_tokens)
        if buffers is None:
            buffers = _Buffers.make(num_tokens, self._weights, self._make_norm)
            if num_tokens <= _MAX_KEPT_TOKENS:
                self._buffers[num_tokens] = buffers
        return buffers


class _KernelNorm:
    """RMS norm by torch's own operation, one kernel on CUDA."""

    def __init__(self, num_tokens: int, like: torch.Tensor) -> None:
        self.hidden = like.new_empty(num_tokens, like.shape[-1])

    def of(self, norm: Norm) -> torch.Tensor:
        return self.once(self.hidden, norm)

    @staticmethod
    def once(hidden: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Of hidden states that are not these buffers'."""
        return functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.eps)


class _MirrorNorm:
    """RMS norm as the layer norm of [x, -x], whose mean is 0 and whose variance is the mean square of x.

    Torch has one CPU kernel for layer norm; its RMS norm is nine operations there (20 us, this 6).
    """

    def __init__(self, num_tokens: int, like: torch.Tensor) -> None:
        self._size = like.shape[-1]
        self.both = like.new_empty(num_tokens, 2 * self._size)
        self.hidden = self.both[:, : self._size]
        self.mirrored = self.both[:, self._size :]
        self._shape = (2 * self._size,)

    def of(self, norm: Norm) -> torch.Tensor:
        torch.neg(self.hidden, out=self.mirrored)
        normed: torch.Tensor = torch.native_layer_norm(self.both, self._shape, norm.twice, None, norm.eps)[0]
        return normed[:, : self._size]

    @staticmethod
    def once(hidden: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Of hidden states that are not these buffers'."""
        both = torch.cat((hidden, -hidden), dim=-1)
        normed: torch.Tensor = torch.native_layer_norm(both, both.shape[-1:], norm.twice, None, norm.eps)[0]
        return normed[:, : hidden.shape[-1]]


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Memory of one layer for T tokens, and its views; every layer uses the same."""

    norm: _MirrorNorm | _KernelNorm
    hidden: torch.Tensor
    """[T, hidden_size], the residual stream."""
    qkv: torch.Tensor
    """[T, (num_heads + 2 * num_kv_heads) * head_dim]"""
    unrotated: torch.Tensor
    """[T, num_heads + num_kv_heads, head_dim], as the rotated ones; `first` and `second` are halves of heads."""
    unrotated_first: torch.Tensor
    unrotated_second: torch.Tensor
    unrotated_query: torch.Tensor
    unrotated_key: torch.Tensor
    rotated: torch.Tensor
    rotated_first: torch.Tensor
    rotated_second: torch.Tensor
    query: torch.Tensor
    """[1, num_heads, T, head_dim]"""
    key: torch.Tensor
    """[1, num_kv_heads, T, head_dim], as are the values."""
    value: torch.Tensor
    gate_up: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor

    @classmethod
    def make(cls, num_tokens: int, weights: ModelWeights, make_norm: type[_MirrorNorm] | type[_KernelNorm]) -> _Buffers:
        like = weights.norm.weight
        num_heads, num_kv_heads, head_dim = weights.num_heads, weights.num_kv_heads, weights.head_dim
        num_turned, half = num_heads + num_kv_heads, head_dim // 2
        norm = make_norm(num_tokens, like)
        qkv = like.new_empty(num_tokens, (num_turned + num_kv_heads) * head_dim)
        heads = qkv.view(num_tokens, num_turned + num_kv_heads, head_dim)
        unrotated = heads[:, :num_turned]
        rotated = like.new_empty(num_tokens, num_turned, head_dim)
        gate_up = like.new_empty(num_tokens, weights.layers[0].gate_up.num_outputs)
        gate, up = gate_up.chunk(2, dim=-1)
        return cls(
            norm=norm,
            hidden=norm.hidden,
            qkv=qkv,
            unrotated=unrotated,
            unrotated_first=unrotated[..., :half],
            unrotated_second=unrotated[..., half:],
            unrotated_query=unrotated[:, :num_heads],
            unrotated_key=unrotated[:, num_heads:],
            rotated=rotated,
            rotated_first=rotated[..., :half],
            rotated_second=rotated[..., half:],
            query=rotated[:, :num_heads].transpose(0, 1).unsqueeze(0),
            key=rotated[:, num_heads:].transpose(0, 1).unsqueeze(0),
            value=heads[:, num_turned:].transpose(0, 1).unsqueeze(0),
            gate_up=gate_up,
            gate=gate,
            up=up,
        )


def _norm_heads(heads: torch.Tensor, norm: Norm) -> None:
    heads.copy_(functional.rms_norm(heads, heads.shape[-1:], norm.weight, norm.eps))
