"""What every request passes before it is looked at: its key, its client's limits, the size of its body."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.http.errors import BadApiKey, BodyTooLarge, error_response
from coordinator.http.keys import ApiKey, KeyFile
from coordinator.http.limits import Gates
from rpc.errors import OutriderError

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/metrics", "/openapi.json"})
"""What needs no key: says that the server is there and how it is, and gives nobody work."""

OPEN_PREFIX = "/static/"


class DoorKeeper:
    """ASGI middleware: keys and limits. Without a key file everybody is one client."""

    def __init__(self, app: ASGIApp, keys: KeyFile | None, gates: Gates) -> None:
        self._app = app
        self._keys = keys
        self._gates = gates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_PREFIX):
            return await self._app(scope, receive, send)
        try:
            key = self._key_of(Headers(scope=scope))
            if scope["method"] != "POST":
                return await self._app(scope, receive, send)
            async with self._gates.gate_of(key).passed():
                return await self._app(scope, receive, send)
        except OutriderError as error:  # the application answers its own errors, so this is one of ours
            await error_response(error)(scope, receive, send)

    def _key_of(self, headers: Headers) -> ApiKey | None:
        if self._keys is None:
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise BadApiKey("this server needs an API key: send it as 'Authorization: Bearer KEY'")
        key = self._keys.find(secret.strip())
        if key is None:
            raise BadApiKey("the API key is not known here; check it, or ask for a new one")
        return key


class BodyLimit:
    """ASGI middleware: bodies of at most so many bytes, whatever their headers say."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        told = Headers(scope=scope).get("content-length", "")
        if told.isdecimal() and int(told) > self._max_bytes:
            return await error_response(BodyTooLarge(self._problem))(scope, receive, send)
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(BodyTooLarge.http_status, self._problem)
            return message

        await self._app(scope, receive_counted, send)

    @property
    def _problem(self) -> str:
        return f"the body has more than {self._max_bytes} bytes, which is the limit here; send less"
