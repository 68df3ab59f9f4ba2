"""What is beside OpenAI's API: tokens, health, the smallest endpoint, and what any of them says to bad input."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from coordinator.http.chat_template import DEFAULT_TEMPLATE, render_chat
from rpc.errors import InvalidRequest
from speculation.messages import ChatTemplate
from tests.doubles.eventually import eventually
from tests.http.conftest import running_front_door


async def test_tokens_there_and_back(web: httpx.AsyncClient) -> None:
    answer = (await web.post("/tokenize", json={"prompt": "abcj", "return_token_strs": True})).json()
    assert (answer["tokens"], answer["count"], answer["token_strs"]) == ([1, 2, 3, 10], 4, ["a", "b", "c", "j"])
    assert answer["max_model_len"] == 4096
    assert (await web.post("/detokenize", json={"tokens": [1, 2, 3, 10]})).json() == {"prompt": "abcj"}
    chat = {"messages": [{"role": "user", "content": "abc"}]}
    assert (await web.post("/tokenize", json=chat)).json()["count"] > 3


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/detokenize", {"tokens": [99]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/generate", {"prompt": ""}, "prompt"),
        ("/generate", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": "\ud800"}, "prompt"),
        ("/v1/completions", {"prompt": "a", "seed": 1 << 64}, "seed"),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", {"prompt": "a", "speculation": {"k": 1000}}, "speculation.k"),
        ("/v1/completions", {"prompt": "a", "speculation": {"policy": "lucky"}}, "speculation.policy"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools"),
    ],
)
async def test_bad_input_names_its_field(web: httpx.AsyncClient, path: str, body: object, field: str) -> None:
    content = json.dumps(body)  # in ASCII: half a surrogate pair has no UTF-8
    answer = await web.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize("content", [b"{", b"", b"[" * 100_000, b'{"prompt": NaN}', b"\xff", b'{"prompt": 1e999}'])
async def test_what_is_no_json_is_a_bad_request(web: httpx.AsyncClient, content: bytes) -> None:
    answer = await web.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_unknown_paths_and_methods(web: httpx.AsyncClient) -> None:
    assert (await web.get("/v2/everything")).status_code == 404
    wrong = await web.get("/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")


async def test_long_bodies_are_refused_whatever_their_headers_say() -> None:
    async with running_front_door(max_body_bytes=1024) as door, httpx.AsyncClient(base_url=door.url) as web:
        told = await web.post("/v1/completions", content=b"x" * 2000)

        async def parts() -> object:
            for _ in range(20):
                yield b"x" * 100

        untold = await web.post("/v1/completions", content=parts(), headers={"content-type": "application/json"})
    assert (told.status_code, untold.status_code) == (413, 413)


async def test_generate_says_what_speculation_was_worth(web: httpx.AsyncClient) -> None:
    plain = (await web.post("/generate", json={"prompt": "abc", "max_tokens": 20, "use_speculative": False})).json()
    fast = (await web.post("/generate", json={"prompt": "abc", "max_tokens": 20})).json()
    assert fast["text"] == plain["text"]
    assert (plain["metrics"]["K"], plain["metrics"]["acceptance_rate"]) == (0, 0)
    assert plain["metrics"]["speedup"] is None
    assert fast["metrics"]["speedup"] > 1  # scripted steps take the same time, and these committed several tokens
    assert fast["metrics"]["acceptance_rate"] > 0
    assert set(fast) == {"text", "metrics"}


async def test_no_speedup_is_told_of_a_single_token() -> None:
    async with running_front_door() as door, httpx.AsyncClient(base_url=door.url) as web:
        answer = await web.post("/generate", json={"prompt": "abc", "max_tokens": 1})
    assert answer.json()["metrics"]["speedup"] is None


async def test_health_and_version(web: httpx.AsyncClient) -> None:
    assert (await web.get("/health")).json() == {"status": "ok"}
    assert (await web.get("/ready")).json() == {"status": "ready", "num_targets": 1, "num_drafters": 1}
    assert (await web.get("/version")).json()["version"]
    metrics = await web.get("/metrics")
    assert metrics.status_code == 200
    assert metrics.headers["content-type"].startswith("text/plain")


async def test_pages_of_other_origins_may_only_if_told() -> None:
    origin = {"origin": "https://example.org"}
    async with running_front_door() as door, httpx.AsyncClient(base_url=door.url) as web:
        assert "access-control-allow-origin" not in (await web.get("/health", headers=origin)).headers
    async with (
        running_front_door(cors_origins="https://example.org") as door,
        httpx.AsyncClient(base_url=door.url) as web,
    ):
        allowed = (await web.get("/health", headers=origin)).headers
    assert allowed["access-control-allow-origin"] == "https://example.org"


async def test_requests_under_way_are_finished_when_the_server_drains() -> None:
    async with running_front_door() as door, httpx.AsyncClient(base_url=door.url) as web:
        door.target.hold(num_turns=1)
        body = {"prompt": "abc", "max_tokens": 30, "ignore_eos": True}
        request = asyncio.create_task(web.post("/v1/completions", json=body))
        await eventually(lambda: door.num_worker_sessions > 0, "the request is under way")
        drained = asyncio.create_task(door.server.drain())
        door.target.release()
        assert (await request).json()["usage"]["completion_tokens"] == 30
        await drained
        with pytest.raises(httpx.ConnectError):
            await web.get("/health")


async def test_a_stream_that_outlasts_the_grace_says_why_it_ends() -> None:
    async with running_front_door(grace_s=0.1) as door, httpx.AsyncClient(base_url=door.url) as web:
        door.target.hold(num_turns=2)
        body = {"prompt": "abc", "max_tokens": 30, "ignore_eos": True, "stream": True}
        async with web.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            drained = asyncio.create_task(door.server.drain())
            events = [line async for line in lines if line.startswith("data: ")]
        await drained
    assert "the coordinator is stopping" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]


async def test_a_message_without_content_and_a_body_that_is_not_called_json(web: httpx.AsyncClient) -> None:
    answer = await web.post("/v1/chat/completions", json={"messages": [{"role": "user"}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages.0.content")
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = await web.post("/v1/completions", content=b'{"prompt": "a"}', headers=form)
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["speculation", "stream", "ignore_eos", "model", "stop", "stream_options"])
async def test_null_is_unset(web: httpx.AsyncClient, field: str) -> None:
    answer = await web.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2, field: None})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": 5}, "prompt: input should be a valid string or a valid list"),
        ("completions", {"prompt": "a", "stop": 5}, "stop: input should be a valid string or a valid list"),
        ("completions", {"prompt": "a", "stop": {"a": 1}}, "stop: input should be a valid string or a valid list"),
        ("completions", {"prompt": "a", "stop": ["b", 1]}, "stop.1: input should be a valid string"),
        ("completions", {"prompt": "a", "max_tokens": True}, "max_tokens: input should be a valid integer"),
        ("completions", {"prompt": "a", "max_tokens": "5"}, "max_tokens: input should be a valid integer"),
        ("completions", {"prompt": "a", "temperature": "1"}, "temperature: input should be a valid number"),
        ("completions", {"prompt": "a", "stream": "true"}, "stream: input should be a valid boolean"),
        ("completions", {"prompt": "a", "speculation": 5}, "speculation: input should be a valid object"),
        ("chat/completions", {"content": 5}, "messages.0.content: input should be a valid string or a valid list"),
        ("chat/completions", {"content": ["a"]}, "messages.0.content.0: input should be a valid object"),
        (
            "chat/completions",
            {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "text": "a"}]},
            "messages.0.content.1.type: input should be 'text'",
        ),
        (
            "chat/completions",
            {"content": "a", "tool_calls": [{}]},
            "messages.0.tool_calls: is not supported by this server; leave it out",
        ),
    ],
)
async def test_a_value_of_a_wrong_type_is_told_in_the_words_of_the_body(
    web: httpx.AsyncClient, path: str, body: dict[str, object], message: str
) -> None:
    if path == "chat/completions":
        body = {"messages": [{"role": "user", **body}]}
    answer = await web.post(f"/v1/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    assert answer.json()["error"]["param"] == message.partition(":")[0]


def test_templates_get_what_they_expect_and_may_refuse() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "<{{ m.role }}>{{ m.content | tojson }}{% endfor %}{% if thinking %}<think>{% endif %}",
        (("bos_token", "<s>"),),
    )
    messages = [{"role": "user", "content": "<é>"}]
    assert render_chat(template, messages, variables={"thinking": True}) == '<s><user>"<é>"<think>'
    with pytest.raises(InvalidRequest, match="no tools"):
        render_chat(template, [{"role": "tool", "content": ""}])
    with pytest.raises(InvalidRequest):
        render_chat(ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"), messages)


def test_without_a_template_a_chat_is_a_transcript() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert render_chat(DEFAULT_TEMPLATE, messages) == "system: Be brief.\nuser: Hello\nassistant:"
