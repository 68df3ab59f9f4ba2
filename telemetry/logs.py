"""Log lines as people or machines want them, made of the standard library's records by structlog.

Modules log with `logging` and hand values over by ``extra``; whoever owns the process calls `configure_logs` once.
Prompts and outputs are in no record unless somebody asked for them, which is why tracebacks come without local
variables.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

LogFormat = Literal["console", "json"]

_QUIET = {"asyncio": logging.WARNING, "httpx": logging.WARNING, "uvicorn": logging.WARNING, "grpc": logging.ERROR}
"""Libraries that below these levels say nothing of use; gRPC warns of what is meant to be."""


def configure_logs(log_format: LogFormat, level: str, fields: Mapping[str, str], stream: TextIO | None = None) -> None:
    """From now on all records of ``level`` or above are lines on ``stream`` (standard error), with ``fields`` in each.

    Replaces what was configured before.
    """
    import structlog

    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _Adding(fields),
    ]
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(log_format, stream)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name, least in _QUIET.items():
        logging.getLogger(name).setLevel(max(least, root.level))


class _Adding:
    """Puts the same fields into every line, unless the line has its own."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = dict(fields)

    def __call__(self, logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for name, value in self._fields.items():
            event.setdefault(name, value)
        return event


def _renderers(log_format: LogFormat, stream: TextIO) -> list[Any]:
    import structlog

    if log_format == "json":
        # Not dict_tracebacks: it would show local variables, and with them prompts.
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
