"""Weights as `compiled_layers` reads them: all layers together, in panels, in float16 where that loses nothing."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import binding
from numpy.typing import NDArray
from transformers import PreTrainedModel

from inference.compiled_arrays import Ends, Floats, LayerMatrices, Weights
from inference.compiled_layers import PANEL
from inference.fused_weights import ModelWeights, linear_together
from inference.projections import fits_half, half_scale


def of_model(model: PreTrainedModel, weights: ModelWeights) -> tuple[LayerMatrices, Ends]:
    """Copies of the model's weights; ``weights``, which are the same, have its angles."""
    body: Any = model.model
    head: Any = model.lm_head
    kinds = [
        [torch.cat([module.weight.detach() for module in modules]) for modules in of_layers]
        for of_layers in zip(*(linear_together(layer) for layer in body.layers), strict=True)
    ]
    ends = [body.embed_tokens.weight.detach(), head.weight.detach()]
    in_half = _widens_half() and all(fits_half(weight) for weight in itertools.chain(ends, *kinds))
    (qkv, output, gate_up, down), unscales = zip(*(in_panels(kind, in_half) for kind in kinds), strict=True)
    matrices = LayerMatrices(
        input_norm=torch.stack([layer.input_layernorm.weight.detach() for layer in body.layers]).numpy(),
        qkv=qkv,
        attention_output=output,
        mlp_norm=torch.stack([layer.post_attention_layernorm.weight.detach() for layer in body.layers]).numpy(),
        gate_up=gate_up,
        down=down,
        unscales=np.stack(unscales, axis=1),
    )
    return matrices, _ends(ends[0], ends[1], body.norm.weight, weights, in_half)


def _ends(
    embedding: torch.Tensor, head: torch.Tensor, norm: torch.Tensor, weights: ModelWeights, in_half: bool
) -> Ends:
    stored, unscales = _stored([embedding], in_half)
    stored_head, head_unscales = in_panels([head], in_half)
    return Ends(
        embedding=stored[0],
        norm=norm.detach().numpy(),
        head=stored_head[0],
        unscales=np.concatenate([unscales, head_unscales]),
        cos=weights.cos.numpy(),
        sin=weights.sin.numpy(),
    )


def in_panels(weights: Sequence[torch.Tensor], in_half: bool) -> tuple[Weights, Floats]:
    """`_stored`, as [matrices, panels, inputs, PANEL] instead of [matrices, outputs, inputs]."""
    num_outputs, num_inputs = weights[0].shape
    missing = -num_outputs % PANEL
    stored, unscales = _stored([F.pad(weight, (0, 0, 0, missing)) for weight in weights], in_half)
    panels: Weights = stored.reshape(len(weights), -1, PANEL, num_inputs).swapaxes(2, 3).copy()
    return panels, unscales


def _stored(weights: Sequence[torch.Tensor], in_half: bool) -> tuple[Weights, Floats]:
    """Matrices of one shape as one array, and by what each is to be multiplied."""
    if not in_half:
        return torch.stack(list(weights)).detach().numpy(), np.ones(len(weights), np.float32)
    scales = [half_scale(weight) for weight in weights]
    halves = torch.stack([(weight * scale).half() for weight, scale in zip(weights, scales, strict=True)])
    bits: NDArray[np.uint16] = halves.detach().numpy().view(np.uint16)
    return bits, np.array([1 / scale for scale in scales], np.float32)


def _widens_half() -> bool:
    """Whether the processor makes float32 of float16 by itself: without, each number is a function call."""
    return platform.machine() in ("aarch64", "arm64") or bool(binding.get_host_cpu_features().get("f16c"))
