"""The life of the HTTP server: bind, serve, drain, stopped. In the same process and event loop as the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from rpc.server import format_address, listening_socket

KEEP_ALIVE_S = 30

END_S = 2
"""Beyond the grace, for streams to tell their clients why they end."""

SEND_BUFFER_BYTES = 64 * 1024
"""What the system may hold of an answer that its client does not read. Left to itself it takes megabytes for each
connection, and a reader that has stopped would be found out late."""


class HttpServer:
    """One application on one port."""

    def __init__(self, app: FastAPI, host: str, port: int, grace_s: float, end_requests: Callable[[], None]) -> None:
        """``port`` 0 takes any free one. Nothing is bound before `open`. ``end_requests`` ends those that the grace
        was too short for; their streams tell their clients so."""
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(grace_s) + END_S,
        )
        self.address = ""
        self._grace_s, self._end_requests = grace_s, end_requests
        self._host, self._port = host, port
        self._server = _Server(config)
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    async def open(self) -> str:
        """Binds and serves from now on; returns ``host:port``. Raises `AddressInUse` if the address cannot be bound."""
        self._socket = listening_socket(self._host, self._port)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # connections inherit it
        self.address = format_address(self._host, self._socket.getsockname()[1])
        self._serving = asyncio.create_task(self._server.serve([self._socket]), name="http")
        return self.address

    async def drain(self) -> None:
        """No new connections; requests under way end by themselves or are ended after the grace. Idempotent."""
        self._server.should_exit = True
        if self._serving is not None:
            done, _ = await asyncio.wait([self._serving], timeout=self._grace_s)
            if not done:
                self._end_requests()
            await self._serving

    async def stop(self) -> None:
        """Ends what is under way within a second. Idempotent."""
        self._server.config.timeout_graceful_shutdown = 1
        self._grace_s = 0.0
        await self.drain()
        if self._socket is not None:
            self._socket.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the coordinator's process, which stops both of its servers."""
        yield
