from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from .tiny_models import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> str:
    """`OUTRIDER_TEST_DEVICE=cuda pytest tests/inference` runs the models of these tests on a GPU."""
    return os.environ.get("OUTRIDER_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama-gqa", folder)
    return folder
