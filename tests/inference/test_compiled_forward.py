"""Which models run their small steps as machine code, and what happens where that cannot be.

That it computes the right thing is shown in `test_packed_forward`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from inference import Chunk, PagedRuntime, load_model
from inference import compiled_forward as module
from inference.compiled_forward import MAX_COMPILED_ROWS, CompiledForward
from inference.fused_forward import FusedForward
from inference.model_forward import TransformersForward

from .tiny_models import CONFIGS, save_tiny_model

compiled_layers = pytest.importorskip("inference.compiled_layers", reason="numba is not here", exc_type=ImportError)
PANEL, TILE_ROWS = compiled_layers.PANEL, compiled_layers.TILE_ROWS

COMMON = {"llama-gqa", "llama-mha", "llama-3-rope", "mistral"}


def _load(folder: Path, dtype: str = "float32") -> PagedRuntime:
    return load_model(folder, device="cpu", dtype=dtype, kv_tokens=256, block_size=4, compiled=True).runtime


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_models_of_common_layers_are_compiled(architecture: str, tmp_path: Path) -> None:
    save_tiny_model(architecture, tmp_path)
    forward = _load(tmp_path)._forward
    other = TransformersForward if architecture.startswith("gemma") else FusedForward
    assert isinstance(forward, CompiledForward if architecture in COMMON else other)


def test_nothing_is_compiled_unasked(llama_folder: Path) -> None:
    """A target's rows are to be the same bit for bit, however many there are."""
    assert isinstance(load_model(llama_folder, device="cpu", kv_tokens=64).runtime._forward, FusedForward)


def test_only_float32_is_compiled(llama_folder: Path) -> None:
    assert isinstance(_load(llama_folder, "bfloat16")._forward, FusedForward)


def test_large_models_are_not_compiled(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COMPILED_BYTES", 1000)
    assert isinstance(_load(llama_folder)._forward, FusedForward)


def test_numba_may_be_missing(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(_load(llama_folder)._forward, FusedForward)


def _fail(*args: object) -> None:
    raise RuntimeError("no such instruction")


def test_a_compiler_that_fails_is_done_without(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("inference.compiled_layers.compiled_step", lambda cached: _fail)
    assert isinstance(_load(llama_folder)._forward, FusedForward)
    assert "cannot be compiled (no such instruction): not used" in caplog.text


def test_what_is_damaged_on_disk_is_compiled_anew(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = compiled_layers.compiled_step
    monkeypatch.setattr(compiled_layers, "compiled_step", lambda cached: _fail if cached else right(cached))
    assert isinstance(_load(llama_folder)._forward, CompiledForward)
    assert "delete" in caplog.text


def test_compiled_layers_that_are_wrong_are_not_used(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = compiled_layers.compiled_step(cached=True)
    monkeypatch.setattr(
        compiled_layers, "compiled_step", lambda cached: lambda ids, *others: right(ids[::-1].copy(), *others)
    )
    assert isinstance(_load(llama_folder)._forward, FusedForward)
    assert "the compiled layers differ from transformers'" in caplog.text


def test_steps_of_both_sizes_share_the_cache(llama_folder: Path) -> None:
    """What a large step stored a small one reads, and the other way round."""
    sizes = [2, MAX_COMPILED_ROWS + 1, 1, 16]
    results = []
    for runtime in (_load(llama_folder), load_model(llama_folder, device="cpu", kv_tokens=256).runtime):
        sequence = runtime.open()
        results.append(torch.cat([runtime.forward([Chunk(sequence, range(size), size)]) for size in sizes]))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)


def test_many_rows_of_one_long_sequence_are_left_to_others(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads: 8 rows more than one, behind 11 tokens, attend to 4 * 8 * 20 positions."""
    runtime = _load(llama_folder)
    forward = runtime._forward
    assert isinstance(forward, CompiledForward)
    sequence = runtime.open()
    runtime.forward([Chunk(sequence, range(11), 1)])
    forward._run_step = _fail
    monkeypatch.setattr(module, "MAX_SHARED_SCORES", 4 * 8 * 20 - 1)
    runtime.forward([Chunk(sequence, range(9), 1)])
    runtime.truncate(sequence, 11)
    monkeypatch.setattr(module, "MAX_SHARED_SCORES", 4 * 8 * 20)
    with pytest.raises(RuntimeError):
        runtime.forward([Chunk(sequence, range(9), 1)])


@pytest.mark.parametrize("in_half", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 96), (130, 33)], ids=str)
def test_a_product_comes_out_the_same_however_many_rows_there_are(in_half: bool, shape: tuple[int, int]) -> None:
    """Bit for bit, also where outputs fill no panel."""
    from inference.compiled_weights import in_panels

    torch.manual_seed(0)
    weight, inputs = torch.randn(shape).bfloat16().float(), torch.randn(9, shape[1])
    panels, unscales = in_panels([weight], in_half)

    def product(num_rows: int, adds: bool) -> NDArray[np.float32]:
        outputs = np.ones((num_rows, shape[0]), np.float32)
        tile = np.empty((TILE_ROWS, PANEL), np.float32)
        compiled_layers._project(inputs[:num_rows].numpy(), panels[0], unscales[0], adds, tile, outputs)
        return outputs

    expected = inputs.double() @ weight.double().T
    for adds in (False, True):
        whole = product(9, adds)
        torch.testing.assert_close(torch.from_numpy(whole).double(), expected + adds, atol=1e-4, rtol=1e-5)
        for num_rows in range(1, 9):
            np.testing.assert_array_equal(product(num_rows, adds), whole[:num_rows])


def test_zeros_are_no_error(tmp_path: Path) -> None:
    """Where nothing keeps a norm from dividing by zero the result is no number, as it is by transformers."""
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.rms_norm_eps = 0.0
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data[19] = 0.0
    model.save_pretrained(tmp_path)
    runtime = _load(tmp_path)
    assert isinstance(runtime._forward, CompiledForward)
    assert runtime.forward([Chunk(runtime.open(), [19], 1)]).isnan().all()


def test_a_prompt_may_come_in_small_chunks(llama_folder: Path) -> None:
    """Without logits, as a prefill of a few tokens is run."""
    runtime = _load(llama_folder)
    whole, parts = runtime.open(), runtime.open()
    expected = runtime.forward([Chunk(whole, range(20), 1)])
    for start in range(0, 19):
        assert len(runtime.forward([Chunk(parts, [start], 0)])) == 0
    torch.testing.assert_close(runtime.forward([Chunk(parts, [19], 1)]), expected, atol=2e-5, rtol=1e-5)


def test_logits_outlive_the_next_step(llama_folder: Path) -> None:
    runtime = _load(llama_folder)
    sequence = runtime.open()
    first = runtime.forward([Chunk(sequence, [5], 1)])
    kept = first.clone()
    runtime.forward([Chunk(sequence, [6], 1)])
    assert torch.equal(first, kept)


def test_both_ways_count_as_memory(llama_folder: Path) -> None:
    plain = load_model(llama_folder, device="cpu", kv_tokens=64).runtime.num_weight_bytes
    assert plain < _load(llama_folder).num_weight_bytes < 3 * plain
