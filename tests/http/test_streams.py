"""What a stream is under strain: characters split over tokens, readers that do not read, errors on the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Sequence

import httpx
import openai
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from coordinator.http import server
from speculation.messages import SessionError, SessionErrorCode
from tests.doubles import scripted_workers
from tests.doubles.eventually import eventually
from tests.doubles.scripted_workers import ScriptedDrafter, ScriptedTarget, toy_tokenizer_json
from tests.http.conftest import PROMPT, FrontDoor, running_front_door, text_of

MULTIBYTE = "🙂中éa"
"""10 bytes in UTF-8, as many as the toy model has tokens for."""


@pytest.fixture
def says_bytes(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The toy target says these bytes over and over, a token each."""
    monkeypatch.setattr(scripted_workers, "next_token", _next_byte)
    return MULTIBYTE.encode()


def _next_byte(prefix: Sequence[int]) -> int:
    return 1 + (len(prefix) - 1) % 10


def byte_tokenizer(said: bytes) -> bytes:
    return toy_tokenizer_json("".join(_printable(byte) for byte in said))


def _printable(byte: int) -> str:
    """How byte-level vocabularies write a byte that begins or continues a character."""
    pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    table = {}
    for char in MULTIBYTE:
        [(text, _)] = pre_tokenizer.pre_tokenize_str(char)
        table |= dict(zip(char.encode(), text, strict=True))
    return table[byte]


async def test_characters_split_over_tokens_arrive_whole(says_bytes: bytes) -> None:
    tokenizer = byte_tokenizer(says_bytes)
    target, drafter = ScriptedTarget(tokenizer_json=tokenizer), ScriptedDrafter(tokenizer_json=tokenizer)
    async with running_front_door(target, drafter) as door, door.openai() as client:
        request = {"model": "toy-target", "prompt": [1], "max_tokens": 45}
        whole = await client.completions.create(**request)
        stream = await client.completions.create(**request, stream=True)
        parts = [choice.text async for chunk in stream for choice in chunk.choices]
    expected = (says_bytes * 5)[:45].decode(errors="replace")
    assert whole.choices[0].text == text_of(parts) == expected
    assert "🙂中é" in expected
    assert "\ufffd" not in text_of(parts)[:-1]  # the end cuts a character in two, nothing else does


async def test_an_error_on_the_way_is_the_last_event_of_the_stream() -> None:
    async with running_front_door() as door, door.openai() as client:
        stream = await client.completions.create(
            model="toy-target", prompt=PROMPT, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
        )
        for _ in range(3):
            await anext(stream)
        fail_all(door.target)
        with pytest.raises(openai.APIError, match="gave up this request"):
            await _rest(stream)


async def _rest(stream: AsyncIterator[object]) -> int:
    return len([chunk async for chunk in stream])


async def test_an_error_before_the_first_token_has_its_status() -> None:
    async with running_front_door() as door, door.openai() as client:
        door.target.fail_next_open = SessionError(SessionErrorCode.OUT_OF_MEMORY, "no memory is left")
        with pytest.raises(openai.RateLimitError, match="no memory is left"):
            await client.completions.create(model="toy-target", prompt=PROMPT)


async def test_a_reader_that_does_not_read_slows_nobody_and_is_told_why_it_was_ended(
    says_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SEND_BUFFER_BYTES", 4096)  # so that it is full soon
    target = ScriptedTarget(turn_s=0.0002)
    async with (
        running_front_door(target, max_buffered_events=20) as door,
        httpx.AsyncClient() as web,
        posted_without_reading(door, {"max_tokens": 4000}) as reader,
    ):
        await eventually(lambda: target.num_sessions == 1, "the slow reader's request is under way")
        body = {"prompt": PROMPT, "max_tokens": 50, "ignore_eos": True}
        other = await web.post(f"{door.url}/v1/completions", json=body)
        assert other.json()["usage"]["completion_tokens"] == 50
        await eventually(lambda: door.num_worker_sessions == 0, "the slow reader's work has ended", 60)
        rest = (await reader.read()).decode()
    assert '"code":"slow_reader"' in rest
    assert "[DONE]" not in rest


@contextlib.asynccontextmanager
async def posted_without_reading(door: FrontDoor, fields: dict[str, object]) -> AsyncIterator[asyncio.StreamReader]:
    """A streamed completion whose client takes hardly anything from its socket."""
    host, _, port = door.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # the system's buffers take megabytes otherwise
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    try:
        writer.write(_request(host, fields))
        await writer.drain()
        yield reader
    finally:
        writer.close()
        await writer.wait_closed()


def _request(host: str, fields: dict[str, object]) -> bytes:
    """With a trace and a long id, which make every event of the stream long."""
    body = {"prompt": PROMPT, "stream": True, "ignore_eos": True, "speculation": {"trace": True}, **fields}
    content = json.dumps(body)
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        f"x-request-id: {'x' * 128}\r\ncontent-length: {len(content)}\r\n\r\n{content}"
    ).encode()


def fail_all(target: ScriptedTarget) -> None:
    """The target gives up whatever it has."""
    for connection in target.connections:
        sessions = list(connection.sessions)
        connection.sessions.clear()
        error = SessionError(SessionErrorCode.INTERNAL, "told to")
        connection.deliver(scripted_workers.TargetFrame(tuple((session, error) for session in sessions)))
