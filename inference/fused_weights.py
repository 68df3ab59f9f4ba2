"""The weights of a Llama-like model, laid out for `FusedForward`.

The architectures of `FUSABLE` share one layer: RMS norm, attention with rotary positions, RMS norm, gated MLP. They
differ in biases, in norms of queries and keys, and in windows, all of which are read off the model.

Matrices that meet the same input become one. Nothing is held twice: the model's own parameters become views of it, or,
where it is packed (`projections`), the model is not needed any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from inference.attention import LayerRule
from inference.projections import DenseProjection, PackedProjection, Projection, fits_half, packs_here

FUSABLE: tuple[type[PreTrainedModel], ...] = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""Exactly these: a subclass may compute something else."""

_POSITION_ONLY_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary embedding whose angles depend on the position alone."""


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm: x / sqrt(mean(x^2) + eps) * weight, divided by the scale of the projection that takes it."""

    weight: torch.Tensor
    twice: torch.Tensor
    """The weight two times end to end; see `fused_forward._MirrorNorm`."""
    eps: float


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: Norm
    qkv: Projection
    """Outputs: query heads, key heads, value heads."""
    query_norm: Norm | None
    key_norm: Norm | None
    attention_output: Projection
    mlp_norm: Norm
    gate_up: Projection
    """Outputs: gate, then up."""
    down: Projection
    rule: LayerRule

    @property
    def projections(self) -> tuple[Projection, ...]:
        """In the order in which they run."""
        return self.qkv, self.attention_output, self.gate_up, self.down

    @property
    def norms(self) -> list[Norm]:
        found = (self.input_norm, self.query_norm, self.key_norm, self.mlp_norm)
        return [norm for norm in found if norm is not None]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: torch.Tensor
    """[vocab_size, hidden_size]; beside packed projections in the smallest dtype that holds it exactly."""
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Projection
    cos: torch.Tensor
    """Of the rotary embedding: [max_context, head_dim]."""
    sin: torch.Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the states between layers."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def projections(self) -> list[Projection]:
        """Of all layers, in the order in which they run: four each."""
        return [projection for layer in self.layers for projection in layer.projections]

    @property
    def has_common_layers(self) -> bool:
        """In float32, of one rule without softcap, with one epsilon, without biases and norms of queries and keys."""
        first = self.layers[0]
        return self.dtype == torch.float32 and all(
            layer.query_norm is None
            and layer.rule == first.rule
            and layer.rule.softcap is None
            and layer.input_norm.eps == layer.mlp_norm.eps == first.input_norm.eps
            and all(one.bias is None for one in layer.projections)
            for layer in self.layers
        )

    @property
    def num_bytes(self) -> int:
        """Of embedding, projections and norms."""
        norms = [self.norm, *(norm for layer in self.layers for norm in layer.norms)]
        is_tied = isinstance(self.head, DenseProjection) and self.head.matrix.data_ptr() == self.embedding.data_ptr()
        projections = self.projections if is_tied else [*self.projections, self.head]
        return (
            self.embedding.nbytes
            + sum(norm.weight.nbytes for norm in norms)
            + sum(projection.num_bytes for projection in projections)
        )


Project = Callable[[torch.Tensor, torch.Tensor | None], Projection]
"""Makes one of a weight [outputs, inputs] and a bias."""


def fused_weights(model: PreTrainedModel, rules: Mapping[int, LayerRule], max_context: int) -> ModelWeights | None:
    """Rearranges the model's weights; None if it is not of a kind that `FusedForward` knows. The model still runs.

    `rules` says how each layer attends, as its own attention calls have shown. Matrices are packed if this machine can,
    and if all of them can be (`projections.fits_half`).
    """
    if type(model) not in FUSABLE or not _is_plain(model.config):
        return None
    body: Any = model.model
    config: Any = model.config
    project = PackedProjection.make if _can_pack(model) else _dense
    layers = tuple(_layer(layer, rules[index], project) for index, layer in enumerate(body.layers))
    positions = torch.arange(max_context, device=model.device).unsqueeze(0)
    embedding = body.embed_tokens.weight
    cos, sin = body.rotary_emb(embedding, positions)
    head = project(model.lm_head.weight, model.lm_head.bias)
    return ModelWeights(
        embedding=embedding if project is _dense else _smallest(embedding),
        layers=layers,
        norm=_norm(body.norm, head),
        head=head,
        cos=cos[0].contiguous(),
        sin=sin[0].contiguous(),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=int(cos.shape[-1]),
    )


def _is_plain(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default")
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0
    return config.hidden_act == "silu" and kind in _POSITION_ONLY_ROPE and partial == 1.0


def _can_pack(model: PreTrainedModel) -> bool:
    if model.device.type != "cpu" or not packs_here():
        return False
    body: Any = model.model
    head: Any = model.lm_head
    together = [modules for layer in body.layers for modules in linear_together(layer)] + [[head]]
    return all(fits_half(torch.cat([module.weight for module in modules])) for modules in together)


def linear_together(layer: Any) -> list[list[torch.nn.Linear]]:
    """Those that meet the same input together, in the order in which they run."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def _smallest(embedding: torch.Tensor) -> torch.Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        smaller = embedding.detach().to(dtype)
        if torch.equal(smaller.to(embedding.dtype), embedding):
            return smaller
    return embedding


def _layer(layer: Any, rule: LayerRule, project: Project) -> LayerWeights:
    attention = layer.self_attn
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    qkv, attention_output, gate_up, down = (_fused(modules, project) for modules in linear_together(layer))
    return LayerWeights(
        input_norm=_norm(layer.input_layernorm, qkv),
        qkv=qkv,
        query_norm=None if query_norm is None else _norm(query_norm),
        key_norm=None if key_norm is None else _norm(key_norm),
        attention_output=attention_output,
        mlp_norm=_norm(layer.post_attention_layernorm, gate_up),
        gate_up=gate_up,
        down=down,
        rule=rule,
    )


def _norm(module: Any, taken_by: Projection | None = None) -> Norm:
    weight = module.weight if taken_by is None or taken_by.scale == 1 else module.weight / taken_by.scale
    return Norm(weight, torch.cat([weight, weight]), float(module.variance_epsilon))


def _dense(weight: torch.Tensor, bias: torch.Tensor | None) -> DenseProjection:
    return DenseProjection(weight.t(), bias)


def _fused(modules: list[torch.nn.Linear], project: Project) -> Projection:
    """One projection for several of the same input."""
    biases = [module.bias.data for module in modules if module.bias is not None]
    bias = torch.cat(biases) if biases else None
    weights = [module.weight.data for module in modules]
    if project is not _dense:
        return project(torch.cat(weights), bias)
    if weights[0].device.type == "cpu":
        # By input: a product with few rows is bound by reading the matrix once, and BLAS reads it faster in the order
        # in which it adds it up (11 M weights, one core, 1, 5, 9 rows: 1.7, 2.1, 2.9 ms; by output 1.7, 2.5, 5.6).
        matrix = torch.cat([weight.t() for weight in weights], dim=1).contiguous()
    else:
        matrix = torch.cat(weights).t()
    start = 0
    for module, weight in zip(modules, weights, strict=True):  # views, so that the model does not hold them again
        module.weight.data = matrix[:, start : start + len(weight)].t()
        start += len(weight)
    return DenseProjection(matrix, bias)
