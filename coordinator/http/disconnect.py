"""A client that goes away ends what was going on for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from rpc.errors import Cancelled

ResultT = TypeVar("ResultT")


class ClientGone(Cancelled):
    """Nobody is there to read the answer."""


async def while_connected(request: Request, work: Awaitable[ResultT]) -> ResultT:
    """The work's result. Cancels the work and raises `ClientGone` if the client disconnects first.

    The request's body must have been read.
    """
    running = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise ClientGone("the client has disconnected")
        return running.result()
    finally:
        for task in (running, gone):
            task.cancel()
        await asyncio.gather(running, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
