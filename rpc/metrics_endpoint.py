"""A role's metrics at a port of their own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry

from rpc.server import OnStatus, Status, format_address, listening_socket
from telemetry.metrics_http import PATH, serving_metrics


@contextlib.asynccontextmanager
async def metrics_endpoint(
    registry: CollectorRegistry, host: str, port: int | None, on_status: OnStatus, address: str
) -> AsyncIterator[None]:
    """Serves ``registry`` meanwhile and tells where; does nothing if ``port`` is None. ``address`` is the role's own.

    Raises `rpc.errors.AddressInUse`.
    """
    if port is None:
        yield
        return
    with contextlib.closing(listening_socket(host, port)) as listener:
        url = f"http://{format_address(host, listener.getsockname()[1])}{PATH}"
        async with serving_metrics(registry, listener):
            on_status(Status("loading", f"metrics at {url}", address))
            yield
