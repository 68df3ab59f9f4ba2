"""A tiny target, and drafters that agree with it fully, mostly and never."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from inference import PagedRuntime, load_model
from tests.doubles import tiny_models


@pytest.fixture(scope="session")
def target_model() -> LlamaForCausalLM:
    return tiny_models.with_quiet_tail(tiny_models.tiny_llama(seed=1, num_layers=6), num_loud=1, scale=0.2)


@pytest.fixture(scope="session")
def model_folders(target_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = {
        "target": target_model,
        "close": tiny_models.first_layers(target_model, 1),
        "wrong": tiny_models.tiny_llama(seed=2, num_layers=1),
    }
    return {name: tiny_models.save(model, tmp_path_factory.mktemp(name)) for name, model in models.items()}


@pytest.fixture
def make_runtime(model_folders: dict[str, Path]) -> Callable[..., PagedRuntime]:
    def make(name: str = "target", kv_tokens: int = 4096, compiled: bool = False) -> PagedRuntime:
        folder = model_folders[name]
        return load_model(folder, device="cpu", kv_tokens=kv_tokens, num_threads=1, compiled=compiled).runtime

    return make
