"""Attention as two matrix products and a softmax: the fastest on a CPU for few queries, as decoding and verifying have.

For 7 queries over 300 positions (3 heads of 64, one core) torch's fused CPU kernel takes 52 us a layer, these three
operations 32. The keys lie by dimension (`KVCache`), in the order in which the product reads them; scaling and mask are
part of the first product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inference.attention import AttentionStep, LayerRule
from inference.kv_cache import KVCache
from inference.packing import PackedBatch, PackedSequence
from inference.paged_views import RunViews, Writer, additive_mask, first_visible, runs_of, writer_for
from inference.read_plan import ReadPlan, plan_reads

_MAX_SCORES = 1 << 23
"""Scores of one sequence and layer that are held at a time: 32 MiB in float32. Long prefills take turns."""


class MatmulBackend:
    """An `AttentionBackend` for CPUs."""

    def __init__(self, keys_by_dim: bool = True) -> None:
        """``keys_by_dim``: the order in which its products read keys fastest; what else reads them may want another."""
        self._keys_by_dim = keys_by_dim

    @property
    def keys_by_dim(self) -> bool:
        return self._keys_by_dim

    def plan(self, batch: PackedBatch, cache: KVCache) -> AttentionStep:
        return MatmulStep(batch, cache)


class MatmulStep:
    """One step's attention over the paged cache; see `AttentionStep`."""

    def __init__(self, batch: PackedBatch, cache: KVCache) -> None:
        self.cache = cache
        self._sequences = batch.sequences
        self._batch = batch
        self._device = batch.token_ids.device
        self._writer: Writer | None = None
        self._reads_by_rule: dict[LayerRule, list[_Read]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: LayerRule
    ) -> torch.Tensor:
        if self._writer is None:
            self._writer = writer_for(self._batch, self.cache)
        self._writer.write(layer, key, value)
        reads = self._reads_by_rule.get(rule)
        if reads is None:
            reads = self._reads_by_rule[rule] = [
                self._read(sequence, rule, query.dtype) for sequence in self._sequences
            ]
        if len(reads) == 1:
            return reads[0].attend(layer, query[0]).transpose(0, 1).unsqueeze(0)
        outputs = [read.attend(layer, query[0, :, read.start : read.stop]) for read in reads]
        return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0)

    def plan_reads(self, rule: LayerRule, dtype: torch.dtype) -> ReadPlan | None:
        """All that the attention of a step reads and writes; None if it takes turns or is not a plain softmax."""
        num_kv_heads, group_size = self.cache.geometry.num_kv_heads, self.cache.geometry.group_size
        takes_turns = any(
            sequence.num_tokens > 1 and num_kv_heads * group_size * sequence.num_tokens * sequence.context > _MAX_SCORES
            for sequence in self._sequences
        )
        return None if rule.softcap is not None or takes_turns else plan_reads(self._batch, self.cache, rule, dtype)

    def _read(self, sequence: PackedSequence, rule: LayerRule, dtype: torch.dtype) -> _Read:
        geometry = self.cache.geometry
        first = first_visible(sequence, rule.window)
        mask = None
        if sequence.num_tokens > 1:
            mask = additive_mask(sequence, first, rule.window, dtype, self._device).repeat(geometry.group_size, 1)
        return _Read(
            start=sequence.start,
            stop=sequence.stop,
            runs=runs_of(sequence, first, self.cache, transposed_keys=True),
            num_keys=sequence.context - first,
            mask=mask,
            no_mask=torch.zeros((), dtype=dtype, device=self._device),
            num_kv_heads=geometry.num_kv_heads,
            rule=rule,
        )


@dataclass(frozen=True, slots=True)
class _Read:
    """One sequence's attention under one rule: rows [start, stop) against the keys of `runs`."""

    start: int
    stop: int
    runs: tuple[RunViews, ...]
    num_keys: int
    mask: torch.Tensor | None
    """Additive [group_size * T, keys]; None if the rows see all keys."""
    no_mask: torch.Tensor
    """A scalar that stands where the mask would."""
    num_kv_heads: int
    rule: LayerRule

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """[num_heads, T, key_dim] to [num_heads, T, value_dim]."""
        num_heads, num_tokens, key_dim = query.shape
        # The heads that share a key head become rows of it. Contiguous: the product is three times slower on strides.
        rows = query.reshape(self.num_kv_heads, -1, key_dim).contiguous()
        size = max(1, _MAX_SCORES // (self.num_kv_heads * self.num_keys))
        if rows.shape[1] <= size:
            output = self._attend(layer, rows, self.mask)
        else:
            output = torch.cat(
                [
                    self._attend(layer, rows[:, i : i + size], None if self.mask is None else self.mask[i : i + size])
                    for i in range(0, rows.shape[1], size)
                ],
                dim=1,
            )
        return output.view(num_heads, num_tokens, -1)

    def _attend(self, layer: int, rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if len(self.runs) == 1:
            run = self.runs[0]
            return torch.bmm(self._weights(self._scores(rows, run.keys[layer], mask)), run.values[layer])
        # What lies apart is not copied together: the scores are, which are far smaller than keys and values.
        masks: Sequence[torch.Tensor | None] = [None] * len(self.runs) if mask is None else self._by_run(mask)
        scores = [self._scores(rows, run.keys[layer], part) for run, part in zip(self.runs, masks, strict=True)]
        weights = self._by_run(self._weights(torch.cat(scores, dim=-1)))
        output = torch.bmm(weights[0], self.runs[0].values[layer])
        for part, run in zip(weights[1:], self.runs[1:], strict=True):
            output.baddbmm_(part, run.values[layer])
        return output

    def _by_run(self, of_all_keys: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.split(of_all_keys, [run.values[0].shape[1] for run in self.runs], dim=-1)

    def _scores(self, rows: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        rule = self.rule
        if rule.softcap is None:
            added, beta = (self.no_mask, 0) if mask is None else (mask, 1)
            return torch.baddbmm(added, rows, keys, beta=beta, alpha=rule.scaling)
        scores = torch.tanh(torch.bmm(rows, keys) * (rule.scaling / rule.softcap)) * rule.softcap
        return scores if mask is None else scores.add_(mask)

    @staticmethod
    def _weights(scores: torch.Tensor) -> torch.Tensor:
        if scores.dtype == torch.float32:
            return torch.softmax(scores, dim=-1)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
