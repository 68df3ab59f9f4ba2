"""Steps in fixed sizes: which exist, which are used, and that they compute what a step of its own size computes.

`test_packed_forward` compares every mix of prefills, decodes, verifications and forks with transformers, in fixed sizes
too. Here the recorder just computes again, which is what replaying a graph does; with a GPU, graphs are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inference import Chunk, PagedRuntime, load_model
from inference.step_graphs import StepSize, step_sizes


class CountingRecorder:
    """Counts what is recorded and what is run again."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0

    def __call__(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.num_recorded += 1

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            return compute()

        return replay


@pytest.fixture
def recorder() -> CountingRecorder:
    return CountingRecorder()


@pytest.fixture
def runtime(llama_folder: Path, recorder: CountingRecorder) -> PagedRuntime:
    return load_model(llama_folder, device="cpu", kv_tokens=1024, block_size=16, graphs=recorder).runtime


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 16), (16, 16), (17, 16), (1024, 16), (100, 7), (10**6, 16)])
def test_sizes_hold_small_steps_of_the_whole_pool(num_blocks: int, block_size: int) -> None:
    sizes = list(step_sizes(num_blocks, block_size))
    assert len(set(sizes)) == len(sizes) <= 56
    largest = max(size.num_blocks for size in sizes if size.num_tokens == 8)
    assert largest * block_size >= min(num_blocks * block_size, 32_768)
    assert sizes[0].num_blocks == max(size.num_blocks for size in sizes), "the largest come first"


def test_every_size_is_recorded_once_when_loading(runtime: PagedRuntime, recorder: CountingRecorder) -> None:
    assert recorder.num_recorded == len(list(step_sizes(64, 16)))
    assert recorder.num_replayed == 0
    assert StepSize(8, 16) in step_sizes(64, 16)


def test_small_steps_are_replayed_and_large_ones_are_not(runtime: PagedRuntime, recorder: CountingRecorder) -> None:
    sequence = runtime.open()
    runtime.forward([Chunk(sequence, [5] * 65, 1)])
    assert recorder.num_replayed == 0, "a prefill of its own size"
    runtime.truncate(sequence, 20)
    runtime.forward([Chunk(sequence, [5] * 64, 1)])
    runtime.forward([Chunk(sequence, [5] * 7, 7)])
    runtime.forward([Chunk(sequence, [5], 0)])
    assert recorder.num_replayed == 3


def test_padding_changes_nothing(llama_folder: Path, runtime: PagedRuntime) -> None:
    """Three tokens are padded to four, and one of them crosses into a new block; a neighbour must not notice."""
    plain = load_model(llama_folder, device="cpu", kv_tokens=1024, block_size=16).runtime
    results = []
    for each in (plain, runtime):
        first, second = each.open(), each.open()
        each.forward([Chunk(first, range(14), 1), Chunk(second, range(3, 12), 1)])
        found = [each.forward([Chunk(first, [7, 8, 9], 3)]), each.forward([Chunk(second, [4], 1)])]
        found.append(each.forward([Chunk(first, [1], 1), Chunk(second, [2, 3], 1)]))
        results.append(torch.cat(found))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)


def test_logits_outlive_the_next_step(runtime: PagedRuntime) -> None:
    sequence = runtime.open()
    first = runtime.forward([Chunk(sequence, [5], 1)])
    kept = first.clone()
    runtime.forward([Chunk(sequence, [6], 1)])
    assert torch.equal(first, kept)


def test_models_by_transformers_record_nothing(llama_folder: Path, recorder: CountingRecorder) -> None:
    runtime = load_model(llama_folder, device="cpu", kv_tokens=64, fuse=False, graphs=recorder).runtime
    runtime.forward([Chunk(runtime.open(), [5], 1)])
    assert recorder.num_recorded == recorder.num_replayed == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_compute_what_launches_compute(llama_folder: Path, dtype: str) -> None:
    results = []
    for graphs in (True, False):
        runtime = load_model(llama_folder, device="cuda", dtype=dtype, kv_tokens=2048, graphs=graphs).runtime
        first, second = runtime.open(), runtime.open()
        found = [runtime.forward([Chunk(first, range(50), 5), Chunk(second, range(3, 12), 1)])]
        fork = runtime.fork(first)
        runtime.truncate(fork, 40)
        found += [
            runtime.forward([Chunk(first, [7, 8, 9], 3), Chunk(fork, [token], 1), Chunk(second, [4], 1)])
            for token in range(20)
        ]
        results.append(torch.cat(found))
    tolerance = 2e-5 if dtype == "float32" else 0.1
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)
