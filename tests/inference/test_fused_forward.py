"""Which models run on fused layers, and what happens where those would be wrong.

That they compute the right thing is shown in `test_packed_forward`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference import Chunk, load_model
from inference.fused_choice import choose_forward
from inference.fused_forward import FusedForward
from inference.loading import load_weights
from inference.matmul_attention import MatmulBackend
from inference.model_forward import TransformersForward
from inference.model_probe import probe

from .tiny_models import CONFIGS, save_tiny_model


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_llama_like_models_are_fused(architecture: str, tmp_path: Path) -> None:
    save_tiny_model(architecture, tmp_path)
    runtime = load_model(tmp_path, device="cpu", kv_tokens=64).runtime
    fused = not architecture.startswith("gemma")
    assert isinstance(runtime._forward, FusedForward if fused else TransformersForward)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fused_forward_that_is_wrong_is_not_used(
    dtype: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("inference.fused_forward.script_layers", lambda: None)
    right = FusedForward._rotate
    monkeypatch.setattr(FusedForward, "_rotate", staticmethod(lambda *args: right(*args[:-1], -args[-1])))
    runtime = load_model(llama_folder, device="cpu", dtype=dtype, kv_tokens=64).runtime
    assert isinstance(runtime._forward, TransformersForward)
    assert "differ from transformers'" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scripted_layers_are_the_same_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Prefill, decodes, verification and a fork that lies in several runs of blocks, in one batch and alone."""
    save_tiny_model("llama-gqa", tmp_path, dtype)
    results = []
    for is_scripted in (True, False):
        runtime = load_model(tmp_path, device="cpu", kv_tokens=256, block_size=4).runtime
        assert isinstance(runtime._forward, FusedForward)
        assert runtime._forward._scripted is not None
        if not is_scripted:
            runtime._forward._scripted = None
        first, second = runtime.open(), runtime.open()
        found = [runtime.forward([Chunk(first, range(10), 10), Chunk(second, range(7), 1)])]
        fork = runtime.fork(first)
        runtime.truncate(fork, 6)
        found.append(runtime.forward([Chunk(first, [5], 1), Chunk(fork, [6, 7, 8], 3), Chunk(second, [9], 1)]))
        found.append(runtime.forward([Chunk(fork, [3], 1)]))
        results.append(torch.cat(found))
    assert torch.equal(*results)


def test_weights_are_not_held_twice(llama_folder: Path) -> None:
    """The model's own parameters are views of the fused matrices, so that either forward runs on the same memory."""
    model = load_weights(str(llama_folder), torch.float32, torch.device("cpu"))
    choose_forward(model, MatmulBackend(), probe(model), max_context=64)
    attention = model.model.layers[0].self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert len({projection.weight.untyped_storage().data_ptr() for projection in projections}) == 1


def test_logits_outlive_the_next_step(llama_folder: Path) -> None:
    """Buffers are reused from step to step; what has been given out is not among them."""
    runtime = load_model(llama_folder, device="cpu", kv_tokens=64).runtime
    sequence = runtime.open()
    first = runtime.forward([Chunk(sequence, [5], 1)])
    kept = first.clone()
    runtime.forward([Chunk(sequence, [6], 1)])
    assert torch.equal(first, kept)
