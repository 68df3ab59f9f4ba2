"""Channel options that clients and servers share, so that both ends mean the same."""

from __future__ import annotations

import re
from typing import TypeAlias

import grpc

ChannelOptions: TypeAlias = tuple[tuple[str, int], ...]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Far above any frame: a prompt of a million tokens takes 3 MiB."""

KEEPALIVE_MS = 5_000
KEEPALIVE_TIMEOUT_MS = 5_000

_SHARED: ChannelOptions = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without closing its socket is noticed within KEEPALIVE_MS + KEEPALIVE_TIMEOUT_MS.
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
)

CLIENT_OPTIONS: ChannelOptions = (
    *_SHARED,
    # A restarted worker is found again quickly; gRPC's own default starts at 1 s and grows to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Own connections, own backoff: a channel to the same address made later starts afresh.
    ("grpc.use_local_subchannel_pool", 1),
)

SERVER_OPTIONS: ChannelOptions = (
    *_SHARED,
    # Otherwise a second server on the same port would bind, and silently share the connections.
    ("grpc.so_reuseport", 0),
    # Clients ping every KEEPALIVE_MS even when nothing flows; the default would call that abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
)


def check_address(address: str) -> None:
    """Raises ValueError unless it is ``host:port`` (or ``unix:path``): without a port gRPC would take 443."""
    if not re.fullmatch(r"unix:.+|(\[[^\]]+\]|[^:/\[\]]+):\d{1,5}", address):
        raise ValueError(f"{address!r} is no host:port")


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to ``host:port``; connects on first use."""
    return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
