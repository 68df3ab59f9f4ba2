"""Waiting for something that another task or process does, with a deadline instead of a guess."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def eventually(condition: Callable[[], bool], what: str, deadline_s: float = 15.0) -> None:
    """Returns when ``condition()`` holds; raises AssertionError naming ``what`` if it does not within the deadline."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + deadline_s
    while not condition():
        assert loop.time() < end_s, f"not within {deadline_s:g} s: {what}"
        await asyncio.sleep(0.002)
