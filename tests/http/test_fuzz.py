"""Whatever the served OpenAPI document allows, and much that it does not: no answer is a 5xx."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests.doubles.scripted_workers import ScriptedTarget
from tests.http.conftest import running_front_door

NUM_EXAMPLES = 100
MAX_TOKENS = 50


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server on a thread of its own, for schemathesis is synchronous."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found: list[str] = []

    async def serve() -> None:
        async with running_front_door(ScriptedTarget(turn_s=0.0001), max_body_bytes=64 * 1024) as door:
            found.append(door.url)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    yield found[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


@pytest.fixture(scope="module")
def openapi(url: str) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/generate", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/version", "GET"),
    ("/metrics", "GET"),
]


def test_every_operation_is_tried(openapi: schemathesis.BaseSchema) -> None:
    served = {(found.ok().path, found.ok().method.upper()) for found in openapi.get_all_operations()}
    assert served == set(OPERATIONS)


def _with_modes() -> Iterator[tuple[str, str, GenerationMode]]:
    for path, method in OPERATIONS:
        yield path, method, GenerationMode.POSITIVE
        if method == "POST":  # nothing can be wrong about the others
            yield path, method, GenerationMode.NEGATIVE


@pytest.mark.parametrize(("path", "method", "mode"), list(_with_modes()))
def test_no_answer_is_a_server_error(
    openapi: schemathesis.BaseSchema, path: str, method: str, mode: GenerationMode
) -> None:
    cases = openapi[path][method].as_strategy(generation_mode=mode)

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=cases)
    def check(case: schemathesis.Case) -> None:
        _shorten(case.body)
        response = case.call(timeout=30)
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code >= 400:
            assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}

    check()


def _shorten(body: object) -> None:
    """What is asked matters here, not for how much of it."""
    if isinstance(body, dict):
        wanted = body.get("max_tokens")
        if (isinstance(wanted, int) and wanted > MAX_TOKENS) or (wanted is None and body.get("ignore_eos")):
            body["max_tokens"] = MAX_TOKENS
