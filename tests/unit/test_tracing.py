"""Traces are an extra: without OpenTelemetry everything works, and nothing of it is imported."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from telemetry.tracing import (
    ENDPOINT_VARIABLES,
    NO_SPAN,
    NO_TRACING,
    TracingUnavailable,
    caller_context,
    make_tracing,
    set_caller,
)

CONTEXT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENDPOINT_VARIABLES, "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def test_without_an_endpoint_nothing_is_traced() -> None:
    assert make_tracing("coordinator") is NO_TRACING
    assert NO_TRACING.start("generate") is NO_SPAN


def test_a_role_without_traces_hands_the_context_on() -> None:
    span = NO_TRACING.start("generate", CONTEXT)

    assert (span.context, span.is_recording) == (CONTEXT, False)


def test_a_coordinator_and_its_command_line_import_nothing_that_traces() -> None:
    # The API alone is another matter: FastAPI imports it where it is installed.
    code = (
        "import sys, coordinator.serve, outrider.cli, telemetry.tracing as tracing; tracing.make_tracing('client');"
        "traces = ('opentelemetry.sdk', 'opentelemetry.exporter');"
        "print(sorted(name for name in sys.modules if name.startswith(traces)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_not_installed_and_asked_for_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_opentelemetry(monkeypatch)

    with pytest.raises(TracingUnavailable, match=r"pip install 'outrider\[trace\]'"):
        make_tracing("coordinator", "http://127.0.0.1:4317")


def test_not_installed_and_only_a_variable_says_so_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hide_opentelemetry(monkeypatch)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")

    assert make_tracing("coordinator") is NO_TRACING
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "outrider[trace]" in record.getMessage()


def hide_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "telemetry.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)


@pytest.mark.parametrize(
    "sent", [None, "", "hello", CONTEXT.upper(), CONTEXT + "-00", CONTEXT.encode(), "x" * 10_000, "00-é"]
)
def test_what_is_no_traceparent_is_ignored(sent: str | bytes | None) -> None:
    set_caller(CONTEXT)
    assert caller_context() == CONTEXT

    set_caller(sent)
    assert caller_context() == ""
