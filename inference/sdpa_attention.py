"""Attention by torch's `scaled_dot_product_attention`: runs on any device, one call per sequence and layer.

All that does not depend on the layer is done once per step: where keys and values are written, which view of the
cache each sequence reads, its mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from inference.attention import AttentionStep, LayerRule
from inference.kv_cache import KVCache
from inference.packing import PackedBatch, PackedSequence
from inference.paged_views import RunViews, additive_mask, first_visible, runs_of, writer_for


class SdpaBackend:
    """An `AttentionBackend` for CUDA, whose attention kernels it uses; also runs on a CPU."""

    keys_by_dim = False

    def plan(self, batch: PackedBatch, cache: KVCache) -> AttentionStep:
        return SdpaStep(batch, cache)


class SdpaStep:
    """One step's attention over the paged cache; see `AttentionStep`."""

    def __init__(self, batch: PackedBatch, cache: KVCache) -> None:
        self._sequences = batch.sequences
        self._cache = cache
        self._group_size = cache.geometry.group_size
        self._device = batch.token_ids.device
        self._writer = writer_for(batch, cache)
        self._reads_by_rule: dict[LayerRule, list[_Read]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: LayerRule
    ) -> torch.Tensor:
        self._writer.write(layer, key, value)
        reads = self._reads_by_rule.get(rule)
        if reads is None:
            reads = self._reads_by_rule[rule] = [
                self._read(sequence, rule, query.dtype) for sequence in self._sequences
            ]
        if len(reads) == 1:
            return reads[0].attend(layer, query, rule).transpose(1, 2)
        outputs = [read.attend(layer, query[:, :, read.start : read.stop], rule) for read in reads]
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _read(self, sequence: PackedSequence, rule: LayerRule, dtype: torch.dtype) -> _Read:
        first = first_visible(sequence, rule.window)
        fits_window = rule.window is None or sequence.num_tokens <= rule.window
        is_fresh = sequence.num_cached == 0 and fits_window and rule.softcap is None
        # Additive and not boolean: SDPA would convert a boolean one again in every layer.
        needs_mask = sequence.num_tokens > 1 and not is_fresh
        mask = additive_mask(sequence, first, rule.window, dtype, self._device) if needs_mask else None
        if mask is not None and self._group_size > 1:
            mask = mask.repeat(self._group_size, 1)
        return _Read(
            start=sequence.start,
            stop=sequence.stop,
            runs=runs_of(sequence, first, self._cache),
            mask=mask,
            is_causal=is_fresh and sequence.num_tokens > 1,
            group_size=self._group_size,
        )


@dataclass(frozen=True, slots=True)
class _Read:
    """One sequence's attention under one rule: rows [start, stop) against the keys of `runs`."""

    start: int
    stop: int
    runs: tuple[RunViews, ...]
    mask: torch.Tensor | None
    """Additive [group_size * T, keys]; None if the rows see all keys, or `is_causal` says it."""
    is_causal: bool
    group_size: int

    @staticmethod
    def _together(views: list[torch.Tensor]) -> torch.Tensor:
        """[1, num_kv_heads, n, dim]; the kernel wants it in one piece."""
        return (views[0] if len(views) == 1 else torch.cat(views, dim=1)).unsqueeze(0)

    def attend(self, layer: int, query: torch.Tensor, rule: LayerRule) -> torch.Tensor:
        """[1, num_heads, T, key_dim] to [1, num_heads, T, value_dim]."""
        keys = self._together([run.keys[layer] for run in self.runs])
        values = self._together([run.values[layer] for run in self.runs])
        if self.is_causal:
            return functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=rule.scaling, enable_gqa=self.group_size > 1
            )
        if self.group_size == 1:
            return attend_masked(query, keys, values, self.mask, rule)
        # The heads that share a key head become rows of it: no copy of the keys per head, on any kernel.
        _, num_heads, num_tokens, _ = query.shape
        folded = query.reshape(1, num_heads // self.group_size, self.group_size * num_tokens, query.shape[-1])
        output = attend_masked(folded, keys, values, self.mask, rule)
        return output.reshape(1, num_heads, num_tokens, values.shape[-1])


def attend_masked(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, rule: LayerRule
) -> torch.Tensor:
    """[1, heads, rows, key_dim] against [1, heads, keys, dim]; `mask` is added to scores, None hides nothing."""
    if rule.softcap is None:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=rule.scaling)
    return attend_by_products(query, keys, values, mask, rule)


def attend_by_products(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, rule: LayerRule
) -> torch.Tensor:
    """The same without a fused kernel: scores lie in memory, softmax in float32."""
    scores = query @ keys.transpose(-1, -2) * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values
