"""The settings of metrics, logs and traces, which all roles share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class TelemetrySettings(BaseSettings):
    """What a role tells of itself, and where."""

    model_config = SettingsConfigDict(use_attribute_docstrings=True)

    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Serve Prometheus metrics at /metrics on this port of the same host. 0 takes any free port; unset: not served."""
    log_format: Literal["console", "json"] = "console"
    """Log lines on standard error: for people, or one JSON object each."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Least severe of what is logged; from info on there is a line for every request."""
    otlp_endpoint: str = ""
    """Send OpenTelemetry traces here by OTLP over gRPC, say http://127.0.0.1:4317. Empty: what
    OTEL_EXPORTER_OTLP_ENDPOINT says, or none."""
