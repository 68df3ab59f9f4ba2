"""Configuration of a coordinator's process. Defaults are written here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from rpc.channel import check_address
from telemetry.settings import TelemetrySettings

Addresses = Annotated[tuple[str, ...], NoDecode]


class CoordinatorSettings(TelemetrySettings):
    """Every field has an environment twin ``OUTRIDER_COORDINATOR_<FIELD>``; lists are comma-separated there."""

    model_config = SettingsConfigDict(
        env_prefix="OUTRIDER_COORDINATOR_", frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    targets: Addresses
    """``host:port`` of every target worker; at least one."""
    drafts: Addresses = ()
    """``host:port`` of every draft worker; none is plain decoding."""
    host: str = "127.0.0.1"
    """Interface to listen on; 0.0.0.0 is all of them."""
    port: int = Field(50051, ge=0, le=65535)
    """0 takes any free port."""
    http_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the OpenAI-compatible HTTP API, on the same interface. 0: any free one. Unset: no HTTP."""
    served_model_name: str = ""
    """Name by which HTTP clients know the model. Unset: its own; of a path the last part."""
    api_keys: Path | None = None
    """File of the API keys that HTTP clients need, made by ``outrider api-key``; read again when it changes. Unset: no
    key is needed."""
    key_requests_per_minute: int = Field(0, ge=0)
    """Requests that one API key may start in a minute, where the file says nothing else. 0: any number."""
    key_max_concurrent: int = Field(0, ge=0)
    """Requests that one API key may have under way, where the file says nothing else. 0: any number."""
    key_max_waiting: int = Field(16, ge=1)
    """Requests of one API key that may wait for these two limits; one more is answered with 429."""
    key_max_wait_s: float = Field(30.0, gt=0)
    """A request that has waited for these two limits for so long is answered with 429."""
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Longest body of an HTTP request."""
    cors_origins: Addresses = ()
    """Origins whose pages may use the HTTP API from a browser, such as ``https://example.org``; ``*`` is all of them.
    None: no other origin than the server's own."""
    policy: Literal["fixed", "threshold", "goodput"] = "goodput"
    """How K is chosen where a request does not say."""
    max_k: int = Field(12, ge=0, le=64)
    """Greatest K (for ``fixed`` the K itself) where a request does not say. 0 is plain decoding. Steps take fewer
    drafted tokens where more do not pay."""
    max_lookup: int = Field(12, ge=0, le=64)
    """Where a step has fewer drafted tokens, also verify what followed the same tokens earlier in the sequence (prompt
    lookup), up to so many of both together. 0: never."""
    max_lookahead: int = Field(64, ge=0, le=256)
    """Draft at most this many tokens beyond the committed ones; what is asked for is five steps of K + 1."""
    max_branches: int = Field(4, ge=0, le=16)
    """Branches that a drafter may hold ready beside a session's main line, for where that may be wrong. It grows them
    only while they pay. 0: chains alone."""
    plain_share: float = Field(0.0, ge=0, le=1)
    """Decode this share of the requests plainly, drawn by lot among those that do not say how to speculate. The metrics
    tell both arms apart, so the speedup is measured on real traffic."""
    log_prompts: bool = False
    """Write prompts and outputs into the log lines of requests, which are otherwise never logged."""
    max_sessions: int = Field(64, ge=1)
    """Sessions under way at one target."""
    max_queue: int = Field(256, ge=0)
    """Requests that may wait for a place; one more is RESOURCE_EXHAUSTED."""
    queue_timeout_s: float = Field(60.0, gt=0)
    """A request that found no place for so long is RESOURCE_EXHAUSTED."""
    target_wait_s: float = Field(30.0, gt=0)
    """How long a session without any target waits for one to come (back) before it is UNAVAILABLE."""
    max_buffered_events: int = Field(4096, ge=1)
    """Events a client may leave unread before its request is ended."""
    max_requests_per_stream: int = Field(256, ge=1)
    """Requests under way on one GenerateMany stream."""
    connect_timeout_s: float = Field(5.0, gt=0)
    """For each step of connecting to a worker; then it is tried again, for ever."""
    draft_latency_ms: float = Field(0.0, ge=0)
    """For experiments: frames from and to draft workers arrive so much later, each way. The coordinator stands beside
    the target, so this is how far away the drafter is."""
    grace_s: float = Field(5.0, ge=0)
    """When stopping: seconds that requests under way get to finish."""

    @field_validator("targets", "drafts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("targets")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("at least one target worker is needed, as host:port")
        return value

    @field_validator("targets", "drafts")
    @classmethod
    def _check_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            check_address(address)
        return value
