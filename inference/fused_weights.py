"""The weights of a Llama-like model, laid out for `FusedForward`.

The architectures of `FUSABLE` share one layer: RMS norm, attention with rotary positions, RMS norm, gated MLP. They
differ in biases, in norms of queries and keys, and in windows, all of which are read off the model.

Nothing is held twice: matrices that meet the same input become one, and the model's own parameters become views of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from inference.attention import LayerRule

FUSABLE: tuple[type[PreTrainedModel], ...] = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""Exactly these: a subclass may compute something else."""

_POSITION_ONLY_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary embedding whose angles depend on the position alone."""


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm: x / sqrt(mean(x^2) + eps) * weight."""

    weight: torch.Tensor
    twice: torch.Tensor
    """The weight two times end to end; see `fused_forward._MirrorNorm`."""
    eps: float


@dataclass(frozen=True, slots=True)
class Projection:
    """y = x @ matrix + bias."""

    matrix: torch.Tensor
    """[inputs, outputs]"""
    bias: torch.Tensor | None


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


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: torch.Tensor
    """[vocab_size, hidden_size]"""
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Projection
    cos: torch.Tensor
    """Of the rotary embedding: [max_context, head_dim]."""
    sin: torch.Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int


def fused_weights(model: PreTrainedModel, rules: Mapping[int, LayerRule], max_context: int) -> ModelWeights | None:
    """Rearranges the model's weights; None if it is not of a kind that `FusedForward` knows. The model still runs.

    `rules` says how each layer attends, as its own attention calls have shown.
    """
    if type(model) not in FUSABLE or not _is_plain(model.config):
        return None
    body: Any = model.model
    config: Any = model.config
    layers = tuple(_layer(layer, rules[index]) for index, layer in enumerate(body.layers))
    positions = torch.arange(max_context, device=model.device).unsqueeze(0)
    cos, sin = body.rotary_emb(body.embed_tokens.weight, positions)
    head_dim = int(cos.shape[-1])
    return ModelWeights(
        embedding=body.embed_tokens.weight,
        layers=layers,
        norm=_norm(body.norm),
        head=Projection(model.lm_head.weight.t(), model.lm_head.bias),
        cos=cos[0].contiguous(),
        sin=sin[0].contiguous(),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
    )


def _is_plain(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default")
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0
    return config.hidden_act == "silu" and kind in _POSITION_ONLY_ROPE and partial == 1.0


def _layer(layer: Any, rule: LayerRule) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerWeights(
        input_norm=_norm(layer.input_layernorm),
        qkv=_fused([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=None if query_norm is None else _norm(query_norm),
        key_norm=None if key_norm is None else _norm(key_norm),
        attention_output=_fused([attention.o_proj]),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_fused([mlp.gate_proj, mlp.up_proj]),
        down=_fused([mlp.down_proj]),
        rule=rule,
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, torch.cat([module.weight, module.weight]), float(module.variance_epsilon))


def _fused(modules: list[torch.nn.Linear]) -> Projection:
    """One projection for several of the same input; their weights become views of it."""
    weights = [module.weight.data for module in modules]
    if weights[0].device.type == "cpu":
        # By input: a product with few rows is bound by reading the matrix once, and BLAS reads it faster in the order
        # in which it adds it up (11 M weights, one core, 1, 5, 9 rows: 1.7, 2.1, 2.9 ms; by output 1.7, 2.5, 5.6).
        matrix = torch.cat([weight.t() for weight in weights], dim=1).contiguous()
    else:
        matrix = torch.cat(weights).t()
    start = 0
    for module, weight in zip(modules, weights, strict=True):
        module.weight.data = matrix[:, start : start + len(weight)].t()
        start += len(weight)
    biases = [module.bias.data for module in modules if module.bias is not None]
    return Projection(matrix, torch.cat(biases) if biases else None)
