"""``traceparent``: a client's trace goes on in the coordinator's span of the request."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from telemetry.tracing import METADATA_KEY, set_caller


class TraceContexts:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            set_caller(Headers(scope=scope).get(METADATA_KEY))
        await self._app(scope, receive, send)
