"""What a runtime runs: packed tokens in, logits out. `TransformersForward` runs any model as transformers wrote it;
`fused_forward.FusedForward` runs the common architectures several times faster.
"""

from __future__ import annotations

from typing import Protocol

import torch
from transformers import PreTrainedModel

from inference.attention import STEP_KEYWORD, AttentionStep
from inference.packing import PackedBatch


class ModelForward(Protocol):
    """One forward pass of a causal language model; attention and its memory are the step's business."""

    @property
    def num_weight_bytes(self) -> int:
        """Memory of the weights it runs."""
        ...

    def run(self, packed: PackedBatch, step: AttentionStep) -> torch.Tensor:
        """The logits of `packed.logit_rows`: float32 [num_logits, vocab_size]; at least one is wanted."""
        ...

    def run_without_logits(self, packed: PackedBatch, step: AttentionStep) -> None:
        """Only the keys and values are wanted: a chunk of a prompt."""
        ...


class TransformersForward:
    """A `ModelForward` by the model's own layers; it must use our registered attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @property
    def num_weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in (*self._model.parameters(), *self._model.buffers()))

    def run(self, packed: PackedBatch, step: AttentionStep) -> torch.Tensor:
        rows = 0 if packed.logit_rows is None else packed.logit_rows  # 0 means all of them
        logits: torch.Tensor = self._model(**_inputs(packed, step), logits_to_keep=rows).logits[0]
        return logits.float()

    def run_without_logits(self, packed: PackedBatch, step: AttentionStep) -> None:
        self._model.base_model(**_inputs(packed, step))


def _inputs(packed: PackedBatch, step: AttentionStep) -> dict[str, object]:
    return {
        "input_ids": packed.token_ids,
        "position_ids": packed.position_ids,
        "use_cache": False,
        STEP_KEYWORD: step,
    }
