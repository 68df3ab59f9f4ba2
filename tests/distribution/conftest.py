"""What all distribution tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def no_cyclic_garbage() -> Iterator[None]:
    """Hundreds of thousands of sessions are alive at once, none of them in a cycle; looking at them all again and again
    took half of the time."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()
