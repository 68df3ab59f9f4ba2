"""Which models run their small steps as machine code, and what happens where that cannot be.

That it computes the right thing is shown in `test_packed_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from inference import Chunk, ContextOverflow, OutOfKVBlocks, PagedRuntime, SamplingRow, draw, load_model
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


def _drawn_one_by_one(
    runtime: PagedRuntime, batch: Sequence[Chunk], rows: Sequence[SamplingRow], depth: int, limit: int
) -> list[tuple[int, list[int]]]:
    """Token and runners-up, those of the first chunk first."""
    drawn: list[list[tuple[int, list[int]]]] = [[] for _ in batch]
    for _ in range(depth):
        logits = runtime.forward(batch)
        positions = [runtime.length(chunk.sequence) for chunk in batch]
        draws = draw(logits, rows, positions, limit=limit, num_runners_up=2)
        for of_chunk, token_id, others in zip(drawn, draws.token_ids, draws.runners_up, strict=True):
            of_chunk.append((token_id, [other.token_id for other in others]))
        batch = [Chunk(chunk.sequence, [token_id], 1) for chunk, token_id in zip(batch, draws.token_ids, strict=True)]
    return [one for of_chunk in drawn for one in of_chunk]


@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (1.5, 0.7, 1.0), (0.0, 2.0, 0.0)], ids=str)
@pytest.mark.parametrize("limit", [2, 40, 96])
def test_a_chain_is_what_comes_one_by_one(llama_folder: Path, temperatures: Sequence[float], limit: int) -> None:
    """A prompt, a decode and a fork that shares blocks; five tokens go beyond a block of four."""
    rows = [SamplingRow(temperature=one, seed=17 + index) for index, one in enumerate(temperatures)]
    results = []
    for chained in (True, False):
        runtime = _load(llama_folder)
        sequences = [runtime.open(), runtime.open()]
        runtime.forward([Chunk(sequences[1], range(9, 20), 1)])
        sequences.append(runtime.fork(sequences[1]))
        tokens = (range(1, 8), [5], [6])
        batch = [Chunk(one, token_ids, 1) for one, token_ids in zip(sequences, tokens, strict=True)]
        if chained:
            draws = runtime.draw_chains(batch, rows, 5, limit=limit, num_runners_up=2)
            assert draws is not None
            assert all(other.gap >= 0 for others in draws.runners_up for other in others)
            others = [[other.token_id for other in others] for others in draws.runners_up]
            results.append(list(zip(draws.token_ids, others, strict=True)))
        else:
            results.append(_drawn_one_by_one(runtime, batch, rows, 5, limit))
        assert [runtime.length(one) for one in sequences] == [7 + 4, 12 + 4, 12 + 4]
        runtime.check_integrity()
    assert results[0] == results[1]


def test_what_cannot_be_drawn_in_a_chain_changes_nothing(llama_folder: Path) -> None:
    runtime = _load(llama_folder)
    sequence = runtime.open()
    runtime.forward([Chunk(sequence, range(5), 0)])

    for row in (SamplingRow(top_p=0.9), SamplingRow(top_k=5), SamplingRow(min_p=0.1), SamplingRow(allowed=bytes(12))):
        assert runtime.draw_chains([Chunk(sequence, [1], 1)], [row], 3, limit=96, num_runners_up=2) is None
    too_many = Chunk(sequence, range(MAX_COMPILED_ROWS + 1), 1)
    assert runtime.draw_chains([too_many], [SamplingRow()], 3, limit=96, num_runners_up=2) is None
    runtime.forward([Chunk(runtime.open(), [1] * 120, 0) for _ in range(2)])
    num_free = runtime.num_free_tokens
    for depth, error in ((20, OutOfKVBlocks), (124, ContextOverflow)):
        with pytest.raises(error):
            runtime.draw_chains([Chunk(sequence, [1], 1)], [SamplingRow()], depth, limit=96, num_runners_up=2)
    uncompiled = load_model(llama_folder, device="cpu", kv_tokens=64).runtime
    chunk = Chunk(uncompiled.open(), [1], 1)
    assert uncompiled.draw_chains([chunk], [SamplingRow()], 3, limit=96, num_runners_up=2) is None

    assert (runtime.length(sequence), runtime.num_free_tokens) == (5, num_free)
    runtime.check_integrity()


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
