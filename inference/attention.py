"""How attention meets transformers, and the seam where another kernel can take its place.

Transformers computes queries, keys and values (projections, norms, rotary embedding) and hands them to the attention
function registered here. That function finds the step it belongs to among the keyword arguments, because extra
keyword arguments of a model's forward reach every layer's attention. No global state, no mask built by transformers:
for an attention it has no mask function for, it passes None.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from transformers import AttentionInterface

from inference.errors import ModelLoadError
from inference.kv_cache import KVCache
from inference.packing import PackedBatch

ATTENTION_NAME = "outrider_paged"
STEP_KEYWORD = "outrider_step"


class LayerRule(NamedTuple):
    """How one layer attends; a step prepares once what layers of one rule share."""

    # A tuple, because one is made and hashed in every layer of every step.
    scaling: float
    window: int | None
    """A token sees itself and the `window - 1` positions before it; None: all of them."""
    softcap: float | None
    """Scores s become softcap * tanh(s / softcap) (Gemma 2); None: unchanged."""


class AttentionStep(Protocol):
    """One step's attention, everything about its batch computed beforehand."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: LayerRule,
    ) -> torch.Tensor:
        """Store the keys and values of the step's T tokens, and attend.

        Args:
            query: [1, num_heads, T, key_dim]
            key: [1, num_kv_heads, T, key_dim]
            value: [1, num_kv_heads, T, value_dim]

        Returns:
            [1, T, num_heads, value_dim]
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute attention over the paged cache: `plan` once per step, then `attend` once per layer."""

    @property
    def keys_by_dim(self) -> bool:
        """How its keys are to lie in memory; see `KVCache`."""
        ...

    def plan(self, batch: PackedBatch, cache: KVCache) -> AttentionStep: ...


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    outrider_step: AttentionStep | None = None,
    **extras: object,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls."""
    if outrider_step is None:
        raise RuntimeError(f"a model loaded with {ATTENTION_NAME!r} attention runs only through its Runtime")
    if attention_mask is not None or not _UNSUPPORTED.isdisjoint(extras):
        _refuse_extras(attention_mask, extras)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer: int = module.layer_idx  # type: ignore[assignment]
    return outrider_step.attend(layer, query, key, value, LayerRule(scaling, sliding_window, softcap)), None


_UNSUPPORTED = frozenset({"s_aux", "position_bias", "is_causal"})
"""Arguments by which models ask for attention sinks, learned position biases and non-causal attention."""


def _refuse_extras(attention_mask: torch.Tensor | None, extras: dict[str, object]) -> None:
    """Refuse what would silently give wrong results. Loading calls every layer once, so this raises there."""
    asked_for = [name for name in sorted(_UNSUPPORTED) if not (extras.get(name) is None or extras[name] is True)]
    if attention_mask is not None:
        asked_for.append("attention_mask")
    if asked_for:
        raise ModelLoadError(f"the model's attention uses {', '.join(asked_for)}, which the paged attention cannot do")


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION_NAME` known to transformers. Safe to repeat."""
    AttentionInterface.register(ATTENTION_NAME, _attend)
