"""``x-request-id``: taken from the client or made up, given to the engine, and sent back with every answer."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.http.errors import error_response, invalid

HEADER = "x-request-id"
_ALLOWED = re.compile(r"[!-~]{1,128}")


class RequestIds:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get(HEADER)
        is_bad = given is not None and not _ALLOWED.fullmatch(given)
        request_id = f"gen-{secrets.token_hex(8)}" if given is None or is_bad else given
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        if is_bad:
            refusal = error_response(invalid(HEADER, "must be 1 to 128 printable ASCII characters without spaces"))
            return await refusal(scope, receive, send_with_id)
        await self._app(scope, receive, send_with_id)


def request_id_of(request: Request) -> str:
    """The id of the request, as its answer will say it."""
    request_id: str = request.state.request_id
    return request_id
