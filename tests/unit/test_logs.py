"""Log lines: one JSON object each, with the values handed over, and no local variables."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from telemetry.logs import configure_logs

_log = logging.getLogger("tests.logs")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def fail(secret: str) -> None:
    local_secret = secret
    raise ValueError(f"a failure of {len(local_secret)} letters")


def test_a_line_is_an_object_with_the_fields_of_the_record_and_the_role() -> None:
    stream = io.StringIO()
    configure_logs("json", "info", {"role": "coordinator"}, stream)

    _log.info("request over", extra={"request_id": "gen-1", "session_id": 7})

    [line] = stream.getvalue().splitlines()
    said = json.loads(line)
    assert said.pop("timestamp").endswith("Z")
    assert said == {
        "event": "request over",
        "level": "info",
        "logger": "tests.logs",
        "request_id": "gen-1",
        "session_id": 7,
        "role": "coordinator",
    }


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_says_where_and_not_with_what(log_format: str) -> None:
    stream = io.StringIO()
    configure_logs(log_format, "debug", {}, stream)  # type: ignore[arg-type]
    try:
        fail(" ".join(["once", "upon", "a", "time"]))  # the line of source is in the traceback
    except ValueError:
        _log.exception("session failed")

    text = stream.getvalue()
    assert "in fail" in text
    assert "a failure of 16 letters" in text
    assert "once upon" not in text


def test_less_severe_than_the_level_is_not_written() -> None:
    stream = io.StringIO()
    configure_logs("console", "warning", {}, stream)

    _log.info("quiet")
    _log.warning("loud", extra={"worker": "host:1"})

    [line] = stream.getvalue().splitlines()
    assert "loud" in line
    assert "worker=host:1" in line
