"""Finding out, with one tiny forward pass, whether a transformers model can run on our attention, and its shapes.

What a model asks of attention is written in its code, not in its config: so we watch the calls its layers make and
refuse what the paged attention would silently get wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from inference.attention import STEP_KEYWORD, LayerRule
from inference.errors import ModelLoadError
from inference.kv_cache import AttentionGeometry

_SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class Probed:
    """What the model's attention layers ask for."""

    geometry: AttentionGeometry
    rules: Mapping[int, LayerRule]
    """By layer."""


class _Probe:
    """An `AttentionStep` that computes nothing and notes what it is asked for."""

    def __init__(self) -> None:
        self.geometry_of_layer: dict[int, tuple[int, int, int, int]] = {}
        self.rules: dict[int, LayerRule] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: LayerRule
    ) -> torch.Tensor:
        self.rules[layer] = rule
        self.geometry_of_layer[layer] = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def probe(model: PreTrainedModel) -> Probed:
    """The shapes and rules of the model's attention layers.

    Raises:
        ModelLoadError: the model has layers that keep state other than keys and values, or attends in a way that
            the paged attention does not implement, or its layers differ in shape.
    """
    config = model.config.get_text_config()
    _require_known_layers(getattr(config, "layer_types", None) or [])
    watched = _Probe()
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    positions = torch.arange(2, device=model.device).unsqueeze(0)
    with torch.inference_mode():
        model(input_ids=ids, position_ids=positions, use_cache=False, **{STEP_KEYWORD: watched})
    layers, shapes = sorted(watched.geometry_of_layer), set(watched.geometry_of_layer.values())
    if layers != list(range(config.num_hidden_layers)):
        raise ModelLoadError(
            f"{len(layers)} of {config.num_hidden_layers} layers use the attention interface of transformers: "
            "only models made of attention layers with keys and values of their own can be served"
        )
    if len(shapes) != 1:
        raise ModelLoadError(f"attention layers of different shapes ({sorted(shapes)}) cannot share a KV pool")
    return Probed(AttentionGeometry(len(layers), *shapes.pop()), watched.rules)


def _require_known_layers(layer_types: list[str]) -> None:
    unknown = sorted(set(layer_types) - _SUPPORTED_LAYER_TYPES)
    if unknown:
        raise ModelLoadError(f"layers of type {', '.join(unknown)} are not supported: only full and sliding attention")


def usable_context(model: PreTrainedModel) -> int:
    """Positions that the model can use, by its config."""
    config = model.config.get_text_config()
    limit = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            limit = min(limit, _original_context(config, parameters))
    return limit


_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
"""These choose their frequencies by the longest position in the batch: beyond the original context a sequence's
output would depend on its neighbours."""


def _original_context(config: PreTrainedConfig, parameters: dict[str, Any]) -> int:
    key = "original_max_position_embeddings"
    return int(parameters.get(key) or getattr(config, key, None) or config.max_position_embeddings)
