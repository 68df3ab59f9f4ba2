"""What the scripted layers read and write in one step, by the numbers of slots: they make their views themselves.

Made here, the views of a draft step with four lines took 150 of its 960 us. To read what lines of one session share
only once was no faster: their own keys lie apart in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from inference.attention import LayerRule
from inference.kv_cache import KVCache, LayerViews
from inference.packing import PackedBatch
from inference.paged_views import SlotRun, additive_mask, first_visible, is_run, new_slots, slot_runs


@dataclass(slots=True)
class ReadPlan:
    """Flat lists, for the script compiler. Read i is of rows [starts[i], starts[i + 1]) and has the runs
    [first_runs[i], first_runs[i + 1])."""

    keys: LayerViews
    """By layer: [num_kv_heads, num_slots, key_dim], all slots."""
    keys_by_dim: LayerViews
    """The same as [num_kv_heads, key_dim, num_slots]."""
    values: LayerViews
    """By layer: [num_kv_heads, num_slots, value_dim]."""
    first_new: int
    """New keys and values go to the slots from here on ..."""
    new_slots: torch.Tensor | None
    """... or to these, int64 [T]."""
    no_mask: torch.Tensor
    """A scalar that stands where a mask would."""
    starts: list[int] = field(default_factory=lambda: [0])
    first_runs: list[int] = field(default_factory=lambda: [0])
    run_starts: list[int] = field(default_factory=list)
    run_lengths: list[int] = field(default_factory=list)
    masks: list[torch.Tensor | None] = field(default_factory=list)
    """By run: [group_size * rows, slots], to be added to scores; None if the rows see all of them."""

    def add_read(self, stop: int, runs: Sequence[SlotRun], masks: Sequence[torch.Tensor | None]) -> None:
        """The next read: of rows up to ``stop``."""
        self.run_starts.extend([run[0] for run in runs])
        self.run_lengths.extend([run[1] - run[0] for run in runs])
        self.masks.extend(masks)
        self.starts.append(stop)
        self.first_runs.append(len(self.run_starts))


def plan_reads(batch: PackedBatch, cache: KVCache, rule: LayerRule, dtype: torch.dtype) -> ReadPlan:
    """The plan of a step whose layers all follow ``rule``."""
    device = batch.token_ids.device
    slots = new_slots(batch, cache.block_size)
    plan = ReadPlan(
        keys=cache.layer_keys,
        keys_by_dim=cache.layer_keys_by_dim,
        values=cache.layer_values,
        first_new=slots[0],
        new_slots=None if is_run(slots) else torch.tensor(slots, device=device),
        no_mask=torch.zeros((), dtype=dtype, device=device),
    )
    for sequence in batch.sequences:
        first = first_visible(sequence, rule.window)
        runs = slot_runs(sequence, first, cache.block_size)
        if sequence.num_tokens == 1:
            plan.add_read(sequence.stop, runs, [None] * len(runs))
        else:
            mask = additive_mask(sequence, first, rule.window, dtype, device).repeat(cache.geometry.group_size, 1)
            plan.add_read(sequence.stop, runs, torch.split(mask, [stop - start for start, stop in runs], dim=-1))
    return plan
