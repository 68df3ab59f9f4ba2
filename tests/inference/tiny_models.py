"""Tiny random models of the architectures that differ in what they ask of attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB_SIZE = 101
WINDOW = 7

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    # Wide enough that scores differ, so that a wrong mask, window or softcap shows.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-mha": lambda: LlamaConfig(**{**_SHAPE, "num_key_value_heads": 4}),
    "llama-gqa": lambda: LlamaConfig(**_SHAPE),
    "llama-biased": lambda: LlamaConfig(**_SHAPE, attention_bias=True),
    "llama-3-rope": lambda: LlamaConfig(
        **_SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2": lambda: Qwen2Config(**{name: value for name, value in _SHAPE.items() if name != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**_SHAPE),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **_SHAPE, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def save_tiny_model(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a random model; the same one each time."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros: mistakes in them would not show
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
