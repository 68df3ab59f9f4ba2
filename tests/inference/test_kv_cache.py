"""How keys and values lie in memory."""

from __future__ import annotations

import pytest
import torch

from inference.kv_cache import AttentionGeometry, KVCache

LINE_BYTES = 64
GEOMETRY = AttentionGeometry(num_layers=2, num_heads=4, num_kv_heads=2, key_dim=8, value_dim=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_blocks", [1, 3, 64, 1024])
def test_dimensions_of_keys_do_not_push_one_another_out_of_a_cache(num_blocks: int, dtype: torch.dtype) -> None:
    """A cache has a power of two of places for lines: an odd number of lines apart, its neighbours share none."""
    cache = KVCache(GEOMETRY, num_blocks, 16, dtype, torch.device("cpu"), keys_by_dim=True)
    keys = cache.layer_keys_by_dim[1]

    num_lines, rest = divmod(keys.stride(1) * keys.element_size(), LINE_BYTES)

    assert keys.shape == (2, 8, 16 * num_blocks)
    assert keys.stride(2) == 1
    assert rest == 0
    assert num_lines % 2 == 1
    assert num_lines * LINE_BYTES - 16 * num_blocks * keys.element_size() < 2 * LINE_BYTES


def test_memory_is_that_of_the_positions() -> None:
    by_dim, natural = (
        KVCache(GEOMETRY, 4, 16, torch.float32, torch.device("cpu"), keys_by_dim=order) for order in (True, False)
    )
    assert by_dim.num_bytes == natural.num_bytes == 2 * 2 * 2 * 8 * 64 * 4
