"""The HTTP API of a running deployment, with the official client."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator

import httpx
import openai
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
    assert plain["metrics"]["K"] == 0
    assert 0 < fast["metrics"]["K"] <= 4  # a mean over steps; those without a drafter count too


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


def test_several_answers_differ_and_the_first_is_the_one_alone(client: OpenAI) -> None:
    answer = client.completions.create(model="target", prompt=PROMPT, max_tokens=40, temperature=0.9, seed=7, n=3)
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == complete(client)
    assert len(set(texts)) == 3


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs_of_completions(client: OpenAI, streamed: bool) -> None:
    fields = {"model": "target", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 3}
    if streamed:
        choices = [c for chunk in client.completions.create(**fields, stream=True) for c in chunk.choices]  # type: ignore[call-overload]
    else:
        choices = client.completions.create(**fields).choices  # type: ignore[call-overload]
    told = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for one in told for token in one.tokens]
    text = "".join(choice.text for choice in choices)
    assert len(tokens) == 12
    for token, offset in zip(tokens, [offset for one in told for offset in one.text_offset], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)  # a part of a character has no text
    for token, value, top in zip(
        tokens,
        [value for one in told for value in one.token_logprobs],
        [top for one in told for top in one.top_logprobs],
        strict=True,
    ):
        assert len(top) == 3
        assert top[token] == max(top.values()) == value < 0  # greedy: the likeliest is the one


def test_logprobs_of_chats(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model="target",
        messages=[{"role": "user", "content": "abc"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    [choice] = chat.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    content = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert content.decode(errors="replace") == choice.message.content
    for token in choice.logprobs.content:
        assert token.top_logprobs[0].token == token.token
        assert len(token.top_logprobs) == 2


def test_a_bias_decides(client: OpenAI, up: Up) -> None:
    url = up.http_url.removesuffix("/v1")
    [token_id] = httpx.post(f"{url}/tokenize", json={"prompt": "x"}).json()["tokens"]
    assert complete(client, logit_bias={str(token_id): 100}, max_tokens=5) == "xxxxx"


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_fits_a_schema(client: OpenAI, streamed: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    fields = {
        "model": "target",
        "messages": [{"role": "user", "content": "Who?"}],
        "max_tokens": 200,
        "seed": 3,
        "response_format": form,
    }
    if streamed:
        stream = client.chat.completions.create(**fields, stream=True)  # type: ignore[call-overload]
        choices = [choice for chunk in stream for choice in chunk.choices]
        text, reason = "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason
    else:
        [choice] = client.chat.completions.create(**fields).choices  # type: ignore[call-overload]
        text, reason = choice.message.content, choice.finish_reason
    assert reason == "stop"
    person = json.loads(text)
    assert set(person) == {"name", "age"}
    assert 0 <= person["age"] <= 99


def test_other_forms(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model="target",
        messages=[{"role": "user", "content": "Yes or no?"}],
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert chat.choices[0].message.content in ("yes", "no")
    assert re.fullmatch("[ab]{3}c", complete(client, extra_body={"guided_regex": "[ab]{3}c"}))
    text = complete(client, max_tokens=60, extra_body={"response_format": {"type": "json_object"}})
    assert text.lstrip().startswith("{")


def test_a_form_that_is_none_names_its_field(client: OpenAI) -> None:
    for field, value in (
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "unheard-of"}}}),
        ("guided_regex", "("),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            complete(client, extra_body={field: value})
        assert refused.value.param == field
