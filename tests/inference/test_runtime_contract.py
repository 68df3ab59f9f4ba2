"""What `Runtime` promises besides the numbers: errors before any change, counts, dtypes, independence of the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inference import Chunk, ContextOverflow, OutOfKVBlocks, PagedRuntime, UnknownSequence, load_model, warm_up
from inference.attention import AttentionStep
from inference.kv_cache import KVCache
from inference.loading import load_weights
from inference.packing import PackedBatch
from inference.sdpa_attention import SdpaBackend

from .tiny_models import VOCAB_SIZE


@pytest.fixture
def runtime(llama_folder: Path, device: str) -> PagedRuntime:
    return load_model(llama_folder, device=device, dtype="float32", kv_tokens=64, block_size=8).runtime


def test_counts(runtime: PagedRuntime) -> None:
    assert (runtime.vocab_size, runtime.max_context, runtime.num_free_tokens) == (VOCAB_SIZE, 64, 64)
    sequence = runtime.open()
    runtime.forward([Chunk(sequence, range(9), 1)])
    assert (runtime.length(sequence), runtime.num_free_tokens) == (9, 48)
    runtime.truncate(sequence, 8)
    assert (runtime.length(sequence), runtime.num_free_tokens) == (8, 56)
    runtime.free(sequence)
    assert runtime.num_free_tokens == 64


def test_no_logits_wanted(runtime: PagedRuntime) -> None:
    sequence = runtime.open()
    assert runtime.forward([Chunk(sequence, [1, 2], 0)]).shape == (0, VOCAB_SIZE)
    assert runtime.forward([]).shape == (0, VOCAB_SIZE)
    assert runtime.length(sequence) == 2


def test_out_of_blocks_changes_nothing(runtime: PagedRuntime) -> None:
    small, large = runtime.open(), runtime.open()
    runtime.forward([Chunk(small, [1] * 8, 0), Chunk(large, [1] * 40, 0)])
    with pytest.raises(OutOfKVBlocks, match="needs 3 KV blocks of 8 tokens and 2 are free"):
        runtime.forward([Chunk(small, [1], 1), Chunk(large, [1] * 9, 1)])
    assert (runtime.length(small), runtime.length(large), runtime.num_free_tokens) == (8, 40, 16)
    runtime.check_integrity()
    runtime.forward([Chunk(small, [1], 1), Chunk(large, [1] * 8, 1)])


def test_context_overflow_changes_nothing(llama_folder: Path, device: str) -> None:
    runtime = load_model(llama_folder, device=device, dtype="float32", kv_tokens=512).runtime
    sequence, other = runtime.open(), runtime.open()
    assert runtime.max_context == 128
    runtime.forward([Chunk(sequence, [1] * 128, 1)])
    with pytest.raises(ContextOverflow, match="would hold 129 tokens, the limit is 128"):
        runtime.forward([Chunk(other, [1], 1), Chunk(sequence, [1], 1)])
    assert (runtime.length(sequence), runtime.length(other)) == (128, 0)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_token_out_of_range(runtime: PagedRuntime, token_id: int) -> None:
    sequence = runtime.open()
    with pytest.raises(ValueError, match="token ids must be in"):
        runtime.forward([Chunk(sequence, [1, token_id], 1)])
    assert runtime.length(sequence) == 0


def test_a_sequence_twice_in_a_batch(runtime: PagedRuntime) -> None:
    sequence = runtime.open()
    with pytest.raises(ValueError, match="twice"):
        runtime.forward([Chunk(sequence, [1], 1), Chunk(sequence, [2], 1)])
    assert runtime.length(sequence) == 0


@pytest.mark.parametrize("num_logits", [-1, 3])
def test_chunk_refuses_impossible_logits(runtime: PagedRuntime, num_logits: int) -> None:
    with pytest.raises(ValueError, match="num_logits must be in"):
        Chunk(runtime.open(), [1, 2], num_logits)


def test_freed_sequence_is_unknown(runtime: PagedRuntime) -> None:
    sequence = runtime.open()
    runtime.free(sequence)
    for use in (runtime.length, runtime.fork, runtime.free):
        with pytest.raises(UnknownSequence, match="is not open"):
            use(sequence)
    with pytest.raises(UnknownSequence):
        runtime.forward([Chunk(sequence, [1], 1)])
    assert runtime.open() != sequence


def test_failing_forward_is_rolled_back(llama_folder: Path, device: str) -> None:
    class FailingStep:
        def attend(self, *args: object) -> torch.Tensor:
            raise torch.OutOfMemoryError

    class FailingBackend(SdpaBackend):
        fails = False

        def plan(self, batch: PackedBatch, cache: KVCache) -> AttentionStep:
            return FailingStep() if self.fails else super().plan(batch, cache)

    backend = FailingBackend()
    runtime = load_model(
        llama_folder, device=device, dtype="float32", kv_tokens=64, block_size=8, backend=backend, graphs=False
    ).runtime
    sequence = runtime.open()
    expected = runtime.forward([Chunk(sequence, range(10), 10)])
    runtime.truncate(sequence, 5)
    backend.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        runtime.forward([Chunk(sequence, range(20, 40), 1)])
    assert (runtime.length(sequence), runtime.num_free_tokens) == (5, 56)
    runtime.check_integrity()
    backend.fails = False
    torch.testing.assert_close(runtime.forward([Chunk(sequence, range(5, 10), 5)]), expected[5:])


def test_a_sequence_does_not_see_its_neighbours(runtime: PagedRuntime) -> None:
    """Bit for bit: the same single-token decode, whatever other sequences hold."""

    def decode(neighbour_token: int) -> torch.Tensor:
        sequence, neighbour = runtime.open(), runtime.open()
        runtime.forward([Chunk(sequence, [5, 6, 7], 0), Chunk(neighbour, [neighbour_token] * 3, 0)])
        logits = runtime.forward([Chunk(sequence, [8], 1), Chunk(neighbour, [neighbour_token], 1)])
        runtime.free(sequence)
        runtime.free(neighbour)
        return logits[0]

    assert torch.equal(decode(1), decode(90))


def test_bfloat16(llama_folder: Path, runtime: PagedRuntime, device: str) -> None:
    half = load_model(llama_folder, device=device, dtype="bfloat16", kv_tokens=64).runtime
    logits = [r.forward([Chunk(r.open(), range(20), 20)]) for r in (runtime, half)]
    assert logits[1].dtype == torch.float32
    assert not torch.equal(*logits)
    torch.testing.assert_close(logits[1], logits[0], atol=0.2, rtol=0.1)


def test_the_model_does_not_run_without_its_runtime(llama_folder: Path, device: str) -> None:
    model: Callable[..., object] = load_weights(str(llama_folder), torch.float32, torch.device(device))
    with pytest.raises(RuntimeError, match="only through its Runtime"):
        model(torch.tensor([[1]], device=device))


def test_warm_up_leaves_nothing_behind(runtime: PagedRuntime) -> None:
    warm_up(runtime)
    assert runtime.num_free_tokens == 64
    runtime.check_integrity()


@pytest.mark.parametrize("kv_tokens", [16, 32, 80])
def test_warm_up_fits_any_pool(llama_folder: Path, device: str, kv_tokens: int) -> None:
    runtime = load_model(llama_folder, device=device, dtype="float32", kv_tokens=kv_tokens, block_size=16).runtime
    warm_up(runtime)
    assert runtime.num_free_tokens == kv_tokens
