"""Packed weights: when they are used, that they say the same, and that they take half the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from inference import Chunk, load_model
from inference.fused_forward import FusedForward
from inference.projections import DenseProjection, PackedProjection, fits_half, packs_here

from .tiny_models import save_tiny_model

needs_packing = pytest.mark.skipif(not packs_here(), reason="torch has no FBGEMM for this processor")


def of_half_precision(shape: tuple[int, int], dtype: torch.dtype, size: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(shape, generator=generator) * size).to(dtype).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-6, 0.02, 30.0])
def test_what_was_stored_in_half_precision_fits(dtype: torch.dtype, size: float) -> None:
    """Weights far below what float16 has digits for too: the scale brings them up."""
    assert fits_half(of_half_precision((300, 200), dtype, size))


def test_what_has_more_digits_does_not_fit() -> None:
    weight = of_half_precision((300, 200), torch.bfloat16)
    weight[7] *= 1 + 2**-13  # one row of 300, in digits that float16 lacks
    assert not fits_half(weight)
    assert not fits_half(torch.randn(4, 5))
    assert not fits_half(torch.full((4, 5), torch.inf))
    weight = of_half_precision((300, 200), torch.bfloat16)
    weight[7, 0] = -1e10  # leaves the others few digits; by the greatest of them all nothing is lost
    assert not fits_half(weight)
    assert not fits_half(torch.full((4, 5), torch.nan))
    assert fits_half(torch.zeros(4, 5))


@needs_packing
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 13, 14, 15, 64])
@pytest.mark.parametrize("size", [1e-6, 0.02, 30.0])
def test_products(num_rows: int, size: float) -> None:
    weight, bias = of_half_precision((190, 70), torch.bfloat16, size), torch.randn(190)
    packed, dense = PackedProjection.make(weight, bias), DenseProjection(weight.t(), bias)
    inputs = torch.randn(num_rows, 140)[:, :70]  # strided, as a norm's are
    exact = (inputs.double() @ weight.t().double() + bias.double()).float()
    close = {"rtol": 1e-5, "atol": 1e-5 * max(size, 0.1) * 8}
    torch.testing.assert_close(packed.of(inputs / packed.scale), exact, **close)
    outputs = torch.empty(num_rows, 190)
    packed.into(outputs, inputs / packed.scale)
    assert torch.equal(outputs, packed.of(inputs / packed.scale))
    hidden = torch.ones(num_rows, 190)
    packed.add_to(hidden, inputs)
    torch.testing.assert_close(hidden, exact + 1, **close)
    torch.testing.assert_close(dense.of(inputs), exact, **close)


@needs_packing
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 13, 17])
def test_a_row_is_the_same_bit_for_bit_among_any_others(num_rows: int) -> None:
    """So plain decoding and verifying do the same arithmetic, as far as these products go."""
    packed = PackedProjection.make(of_half_precision((640, 1100), torch.bfloat16), None)
    inputs = torch.randn(42, 1100)  # seven times six
    together = packed.of(inputs)
    for start in (0, 5, 20):
        alone, among = packed.of(inputs[start : start + num_rows]), together[start : start + num_rows]
        if torch.backends.cpu.get_cpu_capability() == "AVX2":  # one or two rows have kernels of their own there
            torch.testing.assert_close(alone, among, rtol=0.0, atol=4e-6 * float(among.abs().max()))
            num_same = {1: 0, 2: 0, 7: 5}.get(num_rows, num_rows)
            alone, among = alone[:num_same], among[:num_same]
        assert torch.equal(alone, among)


@needs_packing
@pytest.mark.parametrize("architecture", ["llama-gqa", "llama-biased", "qwen2", "qwen3", "mistral"])
def test_models_stored_in_half_precision_are_packed(architecture: str, tmp_path: Path) -> None:
    weight_bytes = {}
    for dtype in (torch.float32, torch.bfloat16):
        save_tiny_model(architecture, tmp_path, dtype)
        runtime = load_model(tmp_path, device="cpu", kv_tokens=64).runtime
        assert isinstance(runtime._forward, FusedForward)
        projection = runtime._forward._weights.layers[0].down
        assert isinstance(projection, PackedProjection if dtype is torch.bfloat16 else DenseProjection)
        weight_bytes[dtype] = runtime.num_weight_bytes
    assert 0.5 <= weight_bytes[torch.bfloat16] / weight_bytes[torch.float32] < 0.52


def test_rows_that_are_almost_nothing_do_no_harm() -> None:
    """What training has let decay, far below what float16 has beside the others."""
    weight = of_half_precision((300, 200), torch.bfloat16)
    weight[7] *= 2.0**-60
    assert fits_half(weight)


@needs_packing
def test_what_is_packed_together_has_to_fit_together(tmp_path: Path) -> None:
    """Queries so much smaller than keys that one scale does not do for both; their products are as ever."""
    save_tiny_model("llama-gqa", tmp_path, torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 2.0**-16
        layer.self_attn.k_proj.weight.data *= 2.0**16
    model.save_pretrained(tmp_path)
    forward = load_model(tmp_path, device="cpu", dtype="float32", kv_tokens=64).runtime._forward
    assert isinstance(forward, FusedForward)
    assert all(isinstance(one, DenseProjection) for one in forward._weights.projections)


@needs_packing
def test_one_matrix_with_more_digits_leaves_all_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model("llama-gqa", tmp_path, torch.bfloat16)
    monkeypatch.setattr("inference.fused_weights.fits_half", lambda weight: len(weight) != 128 and fits_half(weight))
    forward = load_model(tmp_path, device="cpu", kv_tokens=64).runtime._forward
    assert isinstance(forward, FusedForward)
    assert all(isinstance(one, DenseProjection) for one in forward._weights.projections)


def test_without_the_library_nothing_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.quantized.engine", "qnnpack")
    assert not packs_here()
    save_tiny_model("llama-gqa", tmp_path, torch.bfloat16)
    runtime = load_model(tmp_path, device="cpu", kv_tokens=64).runtime
    assert isinstance(runtime._forward, FusedForward)
    assert all(isinstance(one, DenseProjection) for one in runtime._forward._weights.projections)
    assert runtime.forward([Chunk(runtime.open(), [1, 2], 1)]).shape[0] == 1
