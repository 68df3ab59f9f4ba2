"""``python -m outrider.bench.slower_target SOURCE DESTINATION TIMES``: the same model, so many times as slow.

Every layer is there TIMES times, and all but the first copies write nothing: the projections that add to the residual
stream are zero. The text is the same to the bit, and so is what a draft foresees of it; a step takes TIMES as long. So
speculation is measured where steps last as long as those of models that people serve.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def make(source: str, destination: str, times: int) -> None:
    """Writes model and tokenizer into the folder ``destination``."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    slow_down(model, times)
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(source).save_pretrained(destination)


def slow_down(model: Any, times: int) -> None:
    """In place. The model has to be built as Llama is."""
    layers = [copy.deepcopy(layer) for layer in model.model.layers for _ in range(times)]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
        if index % times:
            with torch.no_grad():
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for kind in model.config.layer_types for _ in range(times)]


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2], int(sys.argv[3]))
