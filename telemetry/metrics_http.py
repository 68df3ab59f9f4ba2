"""A registry at ``/metrics``: a server of its own for a role that has no HTTP door, or an app to mount in one that has.

Metrics are collected on the event loop that serves them, so collectors may read what belongs to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

from prometheus_client import CollectorRegistry, make_asgi_app

if TYPE_CHECKING:
    import uvicorn

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

PATH = "/metrics"


def metrics_app(registry: CollectorRegistry) -> ASGIApp:
    """An ASGI app that answers with the registry, whatever the path; Prometheus and OpenMetrics formats."""
    app: ASGIApp = make_asgi_app(registry)
    return app


@contextlib.asynccontextmanager
async def serving_metrics(registry: CollectorRegistry, listener: socket.socket) -> AsyncIterator[None]:
    """Serves the registry meanwhile at ``listener``, which listens already and stays the caller's."""
    server = _make_server(registry)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="metrics")
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await task


def _make_server(registry: CollectorRegistry) -> uvicorn.Server:
    import uvicorn  # a tenth of a second, which only those pay who asked for the port

    class Server(uvicorn.Server):
        """Leaves the signals to the role, which has more to stop than this."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(_only_metrics(metrics_app(registry)), lifespan="off", access_log=False, log_config=None)
    return Server(config)


def _only_metrics(app: ASGIApp) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PATH:
            await app(scope, receive, send)
        else:
            await _not_found(send)

    return answer


async def _not_found(send: Send) -> None:
    headers: list[Any] = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    await send({"type": "http.response.body", "body": f"metrics are at {PATH}\n".encode()})
