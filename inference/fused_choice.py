"""Which forward runs a model: the fused one if it knows the architecture and agrees with transformers on a sample."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from inference.attention import AttentionBackend
from inference.compiled_forward import CompiledForward
from inference.fused_forward import FusedForward
from inference.fused_weights import fused_weights
from inference.kv_cache import KVCache
from inference.kv_pool import KVPool
from inference.model_forward import ModelForward, TransformersForward
from inference.model_probe import Probed
from inference.packing import pack
from inference.runtime import Chunk

_NUM_SAMPLED = 13
"""Few enough for every way to run them itself, and one more than compiled products take together."""

_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of two logits that rounding explains, as a share of the greatest logit."""

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def choose_forward(
    model: PreTrainedModel, backend: AttentionBackend, probed: Probed, max_context: int, compiles: bool = False
) -> ModelForward:
    """`FusedForward` where it applies; it is tried on a few tokens first and not trusted blindly.

    ``compiles``: the same of `CompiledForward`, over it.
    """
    by_transformers = TransformersForward(model)
    weights = fused_weights(model, probed.rules, max_context)
    if weights is None:
        return by_transformers
    expected = _sample(by_transformers, model, backend, probed)

    def agrees(forward: ModelForward, name: str) -> bool:
        found = _sample(forward, model, backend, probed)
        error = float((found - expected).abs().max() / expected.abs().max())
        if error <= _TOLERANCES[model.dtype]:
            return True
        _logger.warning("the %s layers differ from transformers' by %.2g of the greatest logit: not used", name, error)
        return False

    fused = FusedForward(weights)
    if not agrees(fused, "fused"):
        return by_transformers
    if not compiles or not weights.has_common_layers:
        return fused
    for cached in (True, False):  # what is kept on disk may be damaged
        try:
            compiled = CompiledForward(model, weights, fused, cached)
            return compiled if agrees(compiled, "compiled") else fused
        except Exception as error:  # whatever a compiler may raise, the model runs without it
            advice = "if this comes again, delete inference/__pycache__ or numba's cache" if cached else "not used"
            _logger.warning("the layers cannot be compiled (%s): %s", error, advice)
    return fused


def _sample(forward: ModelForward, model: PreTrainedModel, backend: AttentionBackend, probed: Probed) -> torch.Tensor:
    """Logits of a few tokens, in a cache that is forgotten afterwards."""
    size = min(_NUM_SAMPLED, model.config.get_text_config().max_position_embeddings)
    pool = KVPool(1, size)
    cache = KVCache(probed.geometry, 1, size, model.dtype, model.device, keys_by_dim=backend.keys_by_dim)
    sequence = pool.open()
    pool.extend({sequence: size})
    token_ids = [index % model.config.get_text_config().vocab_size for index in range(1, size + 1)]
    packed = pack([Chunk(sequence, token_ids, size)], pool, model.device)
    return forward.run(packed, backend.plan(packed, cache)).clone()
