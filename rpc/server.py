"""The life of a role's gRPC server: bind, loading, ready, draining, stopped.

The port is bound before anything slow, so that a port in use is told at once; health answers NOT_SERVING until
`RpcServer.ready`. Stopping is NOT_SERVING, then no new calls, then a grace period for those under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rpc.channel import SERVER_OPTIONS
from rpc.errors import AddressInUse, Unavailable, abort_with

HEALTH_SERVICE = "grpc.health.v1.Health"


@dataclass(frozen=True, slots=True)
class Status:
    """Where a role's process stands, for whoever started it. ``address`` is ``host:port`` once bound."""

    event: Literal["loading", "ready", "draining", "stopped"]
    detail: str = ""
    address: str | None = None
    http_address: str | None = None
    """``host:port`` of the coordinator's HTTP API, if it has one."""


OnStatus: TypeAlias = Callable[[Status], None]


class RpcServer:
    """A ``grpc.aio`` server with health and reflection, for the services named.

    Servicers may be added to ``grpc_server`` until `ready`; before that their calls are UNAVAILABLE.
    """

    def __init__(self, host: str, port: int, services: Sequence[str]) -> None:
        """``port`` 0 takes any free one. Nothing is bound before `open`."""
        self.grpc_server = grpc.aio.server(options=SERVER_OPTIONS)
        self.address = ""
        self._host, self._port = host, port
        self._services = tuple(services)
        self._loading = _LoadingHandler(self._services)
        self.grpc_server.add_generic_rpc_handlers((self._loading,))  # first, so that it is asked first
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        names = (*self._services, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc_server)

    async def open(self) -> str:
        """Binds and answers health checks with NOT_SERVING; returns ``host:port``.

        Raises `AddressInUse` if the address cannot be bound.
        """
        check_bindable(self._host, self._port)
        try:
            port = self.grpc_server.add_insecure_port(format_address(self._host, self._port))
        except RuntimeError as error:
            raise _address_in_use(self._host, self._port, str(error)) from error
        self.address = format_address(self._host, port)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.grpc_server.start()
        return self.address

    async def ready(self) -> None:
        """From now on calls reach the servicers and health answers SERVING."""
        self._loading.services = ()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING, no new calls; calls under way end by themselves or are cancelled after ``grace_s``."""
        await self._health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace_s)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *self._services):
            await self._health.set(service, status)


class _LoadingHandler(grpc.GenericRpcHandler):
    """Answers for services whose servicers are not there yet: a peer should try again, not give up."""

    def __init__(self, services: Sequence[str]) -> None:
        self.services = services

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        service = handler_call_details.method.split("/")[1]
        if service not in self.services:
            return None
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    @staticmethod
    async def _refuse(requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        problem = "not ready: still loading, or waiting for a worker (its own output says which); try again soon"
        await abort_with(context, Unavailable(problem))


async def serve_until_stopped(
    server: RpcServer, on_status: OnStatus, stop: asyncio.Event | None = None, grace_s: float = 5.0, detail: str = ""
) -> None:
    """SERVING until ``stop`` is set or SIGTERM or SIGINT arrives, then drains and stops ``server``.

    Cancellation stops the server without grace.
    """
    stop = stop or asyncio.Event()
    grace = 0.0
    try:
        with stop_on_signals(stop):
            await server.ready()
            on_status(Status("ready", detail, server.address))
            await stop.wait()
            grace = grace_s
            on_status(Status("draining", f"at most {grace_s:g} s", server.address))
            await server.stop(grace)
    finally:
        await server.stop(0)
        on_status(Status("stopped", "", server.address))


def settle() -> None:
    """Keeps the garbage collector out of the way of whoever has to answer within milliseconds; before serving begins.

    A full collection over what a coordinator imports takes 31 ms, over a worker's more.
    """
    gc.collect()
    gc.freeze()  # what loading made stays for ever: the collector need not look at it again


@contextlib.contextmanager
def stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set ``stop``; outside the main thread, where there are no signals, does nothing."""
    loop = asyncio.get_running_loop()
    handled = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            loop.add_signal_handler(number, stop.set)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def format_address(host: str, port: int) -> str:
    """``host:port``, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_bindable(host: str, port: int) -> None:
    """Raises `AddressInUse`, with the reason, if ``host:port`` cannot be bound now.

    gRPC itself says only "failed to bind" and writes the reason to its log.
    """
    listening_socket(host, port).close()


def listening_socket(host: str, port: int) -> socket.socket:
    """A TCP socket listening at ``host:port``. Raises `AddressInUse`."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
    except OSError as error:
        raise _address_in_use(host, port, _bind_problem(error)) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
        return bound
    except OSError as error:
        bound.close()
        raise _address_in_use(host, port, _bind_problem(error)) from error


def _bind_problem(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; stop what listens there or choose another port (0 takes any free one)"
    return f"{error.strerror or error}; choose another host or port"


def _address_in_use(host: str, port: int, problem: str) -> AddressInUse:
    return AddressInUse(f"cannot listen on {format_address(host, port)} (port {port}): {problem}")
