"""``outrider coordinator``, ``draft-worker`` and ``target-worker``: one role of a deployment, in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Coroutine
from typing import Annotated

import typer

from coordinator.settings import CoordinatorSettings
from draft_worker.settings import DraftWorkerSettings
from outrider.options import with_settings
from outrider.parent_watch import die_with_parent
from outrider.role_process import status_text
from rpc.server import Status, check_bindable
from target_worker.settings import TargetWorkerSettings
from telemetry.logs import configure_logs
from telemetry.settings import TelemetrySettings

STATUS_JSON = "--status-json"
"""Given by a parent process: status as JSON lines on stdout, and the end when standard input ends."""

StatusJson = Annotated[bool, typer.Option(STATUS_JSON, hidden=True)]
OnStatus = Callable[[Status], None]


@with_settings(CoordinatorSettings, "coordinator")
def coordinator(settings: CoordinatorSettings, status_json: StatusJson = False) -> None:
    """Serve clients with the workers given."""
    from coordinator.serve import serve

    _run("coordinator", settings, lambda on_status: serve(settings, on_status), status_json)


@with_settings(DraftWorkerSettings, "draft")
def draft_worker(settings: DraftWorkerSettings, status_json: StatusJson = False) -> None:
    """Draft ahead of the target, with a small model."""
    check_bindable(settings.host, settings.port)  # a port in use is told before torch is imported
    from draft_worker.serve import serve

    _run("draft-worker", settings, lambda on_status: serve(settings, on_status), status_json)


@with_settings(TargetWorkerSettings, "target")
def target_worker(settings: TargetWorkerSettings, status_json: StatusJson = False) -> None:
    """Serve the large model, which decides."""
    check_bindable(settings.host, settings.port)  # a port in use is told before torch is imported
    from target_worker.serve import serve

    _run("target-worker", settings, lambda on_status: serve(settings, on_status), status_json)


def report_failure(message: str, exit_code: int) -> None:
    """Tells the parent process why this role ends."""
    typer.echo(json.dumps({"event": "failed", "detail": message, "exit_code": exit_code}))


def _run(
    role: str,
    settings: TelemetrySettings,
    serve: Callable[[OnStatus], Coroutine[None, None, None]],
    status_json: bool,
) -> None:
    configure_logs(settings.log_format, settings.log_level, {"role": role})
    if status_json:
        die_with_parent()
    asyncio.run(serve(_print_json if status_json else _printer(role)))


def _print_json(status: Status) -> None:
    typer.echo(json.dumps(dataclasses.asdict(status)))


def _printer(role: str) -> OnStatus:
    """Status for people, on stderr; a status that comes again is not shown again."""
    latest = ""

    def show(status: Status) -> None:
        nonlocal latest
        address = _where(status) if status.event == "ready" and status.address else ""
        line = f"{role}: {status_text(status.event, status.detail)}{address}"
        if line != latest:
            typer.echo(line, err=True)
        latest = line

    return show


def _where(status: Status) -> str:
    http = f", HTTP at {status.http_address}" if status.http_address else ""
    return f" (at {status.address}{http})"
