"""A target made slower says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from inference import Chunk, load_model
from outrider.bench.slower_target import slow_down

from .tiny_models import save_tiny_model


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen3", "mistral"])
def test_more_layers_and_the_same_logits(architecture: str, tmp_path: Path) -> None:
    save_tiny_model(architecture, tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    slow_down(model, 3)
    model.save_pretrained(tmp_path / "slower")
    logits, num_layers = [], []
    for name in ("model", "slower"):
        loaded = load_model(tmp_path / name, device="cpu", dtype="float32", kv_tokens=64)
        num_layers.append(loaded.description.num_layers)
        logits.append(loaded.runtime.forward([Chunk(loaded.runtime.open(), range(20), 20)]))
    assert num_layers[1] == 3 * num_layers[0]
    assert torch.equal(*logits)
