"""The HTTP API of a running deployment, with the official client."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from tests.e2e.conftest import Models
from tests.e2e.processes import Up, one_line_of, outrider, running_up

PROMPT = "def read_lines(path):"


@pytest.fixture(scope="module")
def client(up: Up) -> Iterator[OpenAI]:
    with OpenAI(api_key="none", base_url=up.http_url, max_retries=0) as client:
        yield client


def complete(client: OpenAI, **fields: object) -> str:
    given = {"model": "target", "prompt": PROMPT, "max_tokens": 40, "temperature": 0.9, "seed": 7, **fields}
    return str(client.completions.create(**given).choices[0].text)  # type: ignore[call-overload]


def test_the_seed_decides_and_speculation_does_not(client: OpenAI) -> None:
    text = complete(client)
    assert complete(client) == text
    assert complete(client, extra_body={"speculation": {"enabled": False}}) == text
    assert complete(client, seed=8) != text


def test_http_says_what_grpc_says(client: OpenAI, up: Up) -> None:
    flags = ("--max-tokens=40", "--temperature=0.9", "--seed=7")
    assert outrider("generate", PROMPT, "--address", up.address, *flags).stdout.rstrip("\n") == complete(client).rstrip(
        "\n"
    )


def test_streams_are_the_same_text(client: OpenAI) -> None:
    for seed in range(5):
        stream = client.completions.create(
            model="target", prompt="naïve 中文 🙂", max_tokens=40, temperature=1.5, seed=seed, stream=True
        )
        streamed = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        assert streamed == complete(client, prompt="naïve 中文 🙂", temperature=1.5, seed=seed)


def test_chats_and_the_smallest_endpoint(client: OpenAI, up: Up) -> None:
    chat = client.chat.completions.create(
        model="target", messages=[{"role": "user", "content": "abc"}], max_tokens=8, seed=1
    )
    assert chat.usage is not None
    assert chat.usage.completion_tokens <= 8
    url = up.http_url.removesuffix("/v1")
    plain, fast = (
        httpx.post(f"{url}/generate", json={"prompt": PROMPT, "max_tokens": 40, "use_speculative": use}).json()
        for use in (False, True)
    )
    assert plain["text"] == fast["text"]
    assert fast["metrics"]["speedup"] > 0
    assert (plain["metrics"]["K"], fast["metrics"]["K"]) == (0, 4)


def test_a_port_that_is_taken_is_one_line_and_exit_code_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        outcomes = [
            outrider("up", "--grpc-port=0", f"--http-port={port}"),
            outrider("coordinator", "--target=127.0.0.1:1", "--port=0", f"--http-port={port}"),
        ]
    for outcome in outcomes:
        assert outcome.exit_code == 2
        assert re.search(rf"cannot listen on 127\.0\.0\.1:{port}.*in use", one_line_of(outcome.stderr))


def test_a_key_file_that_cannot_be_read_is_one_line_and_exit_code_2() -> None:
    outcome = outrider("coordinator", "--target=127.0.0.1:1", "--port=0", "--http-port=0", "--api-keys=/no/such/file")
    assert outcome.exit_code == 2
    assert "/no/such/file cannot be read" in one_line_of(outcome.stderr)


def test_http_can_be_left_out(models: Models) -> None:
    with running_up("--target", models.target, "--no-draft", "--no-http") as up:
        assert up.http_url == "none"
