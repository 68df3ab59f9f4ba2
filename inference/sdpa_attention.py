"""Attention by torch's `scaled_dot_product_attention`: runs on any device, one call per sequence and layer.

All that does not depend on the layer is done once per step: where keys and values are written, which view of the
cache each sequence reads, its mask. A sequence whose blocks follow one another is read in place; a scattered one is
gathered first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from inference.attention import AttentionStep, LayerRule
from inference.kv_cache import KVCache, LayerViews
from inference.packing import PackedBatch, PackedSequence


class SdpaBackend:
    """An `AttentionBackend` for CPU and CUDA."""

    def plan(self, batch: PackedBatch, cache: KVCache) -> AttentionStep:
        return SdpaStep(batch, cache)


class SdpaStep:
    """One step's attention over the paged cache; see `AttentionStep`."""

    def __init__(self, batch: PackedBatch, cache: KVCache) -> None:
        self._sequences = batch.sequences
        self._cache = cache
        self._group_size = cache.geometry.group_size
        self._device = batch.token_ids.device
        self._write_to = _write_targets(batch, cache)
        self._reads_by_rule: dict[LayerRule, list[_Read]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: LayerRule
    ) -> torch.Tensor:
        self._write_to.write(layer, key, value)
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
        # The first new token sees furthest back; nothing before that is read at all.
        window = sequence.context if rule.window is None else rule.window
        first = max(0, sequence.num_cached + 1 - window)
        is_fresh = sequence.num_cached == 0 and sequence.num_tokens <= window and rule.softcap is None
        needs_mask = sequence.num_tokens > 1 and not is_fresh
        mask = _mask(sequence, first, window, dtype, self._device) if needs_mask else None
        if mask is not None and self._group_size > 1:
            mask = mask.repeat(self._group_size, 1)
        return _Read(
            start=sequence.start,
            stop=sequence.stop,
            source=_source(sequence, first, self._cache, self._device),
            mask=mask,
            is_causal=is_fresh and sequence.num_tokens > 1,
            group_size=self._group_size,
        )


class _Writer:
    """New keys and values go to consecutive slots."""

    def __init__(self, views: tuple[LayerViews, LayerViews]) -> None:
        self._keys, self._values = views

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._keys[layer].copy_(key)
        self._values[layer].copy_(value)


class _ScatteringWriter:
    """New keys and values go to slots anywhere in the cache."""

    def __init__(self, slots: torch.Tensor, cache: KVCache) -> None:
        self._slots = slots
        self._cache = cache

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._cache.layer_keys[layer].index_copy_(1, self._slots, key[0])
        self._cache.layer_values[layer].index_copy_(1, self._slots, value[0])


def _write_targets(batch: PackedBatch, cache: KVCache) -> _Writer | _ScatteringWriter:
    size = cache.block_size
    slots = [
        sequence.blocks[position // size] * size + position % size
        for sequence in batch.sequences
        for position in range(sequence.num_cached, sequence.context)
    ]
    if _is_run(slots):
        return _Writer(cache.slots(slots[0], slots[-1] + 1))
    return _ScatteringWriter(torch.tensor(slots, device=batch.token_ids.device), cache)


class _InPlace:
    """Keys and values of a sequence whose blocks follow one another."""

    def __init__(self, views: tuple[LayerViews, LayerViews]) -> None:
        self._keys, self._values = views

    def fetch(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._keys[layer], self._values[layer]


class _Gathered:
    """Keys and values of a sequence whose blocks lie apart: copied together for each layer."""

    def __init__(self, blocks: torch.Tensor, skip: int, num_keys: int, cache: KVCache) -> None:
        self._blocks = blocks
        self._range = slice(skip, skip + num_keys)
        self._cache = cache

    def fetch(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._gather(self._cache.layer_key_blocks[layer]), self._gather(self._cache.layer_value_blocks[layer])

    def _gather(self, memory: torch.Tensor) -> torch.Tensor:
        slots = memory.index_select(1, self._blocks).flatten(1, 2)
        return slots[:, self._range].unsqueeze(0)


def _source(sequence: PackedSequence, first: int, cache: KVCache, device: torch.device) -> _InPlace | _Gathered:
    """Where positions [first, context) of the sequence are read."""
    size = cache.block_size
    blocks = sequence.blocks[first // size :]
    skip, num_keys = first % size, sequence.context - first
    if _is_run(blocks):
        start = blocks[0] * size + skip
        return _InPlace(cache.slots(start, start + num_keys))
    return _Gathered(torch.tensor(blocks, device=device), skip, num_keys, cache)


@dataclass(frozen=True, slots=True)
class _Read:
    """One sequence's attention under one rule: rows [start, stop) against the keys that `source` gives."""

    start: int
    stop: int
    source: _InPlace | _Gathered
    mask: torch.Tensor | None
    """Additive [group_size * T, keys]; None if the rows see all keys, or `is_causal` says it."""
    is_causal: bool
    group_size: int

    def attend(self, layer: int, query: torch.Tensor, rule: LayerRule) -> torch.Tensor:
        """[1, num_heads, T, key_dim] to [1, num_heads, T, value_dim]."""
        keys, values = self.source.fetch(layer)
        if self.is_causal:
            return functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=rule.scaling, enable_gqa=self.group_size > 1
            )
        if self.group_size == 1:
            return _attend(query, keys, values, self.mask, rule)
        # The heads that share a key head become rows of it: no copy of the keys per head, on any kernel.
        _, num_heads, num_tokens, _ = query.shape
        folded = query.reshape(1, num_heads // self.group_size, self.group_size * num_tokens, query.shape[-1])
        output = _attend(folded, keys, values, self.mask, rule)
        return output.reshape(1, num_heads, num_tokens, values.shape[-1])


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, rule: LayerRule
) -> torch.Tensor:
    if rule.softcap is None:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=rule.scaling)
    scores = query @ keys.transpose(-1, -2) * rule.scaling
    scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values


def _mask(sequence: PackedSequence, first: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Additive mask [T, context - first]: 0 where the row may look, -inf elsewhere."""
    # Additive and not boolean: SDPA would convert a boolean one again in every layer.
    keys = torch.arange(first, sequence.context, device=device)
    rows = torch.arange(sequence.num_cached, sequence.context, device=device).unsqueeze(1)
    hidden = keys > rows
    if sequence.context - first > window:
        hidden |= keys <= rows - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _is_run(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))
