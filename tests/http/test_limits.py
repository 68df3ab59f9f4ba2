"""Who may ask, and for how much."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from coordinator.http.keys import hash_key, make_key, read_keys
from outrider.cli import run
from rpc.errors import InvalidRequest
from tests.doubles.eventually import eventually
from tests.http.conftest import PROMPT, FrontDoor, running_front_door


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def ask(client: AsyncOpenAI, max_tokens: int = 4) -> asyncio.Task[object]:
    return asyncio.create_task(client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=max_tokens))


async def is_let_in(door: FrontDoor, key: str) -> bool:
    async with door.openai(api_key=key) as client:
        try:
            await client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=1)
        except openai.AuthenticationError as error:
            return error.code != "invalid_api_key"
        return True


async def test_only_known_keys_are_let_in_and_a_changed_file_counts_at_once(key_file: Path) -> None:
    one, two = make_key(), make_key()
    key_file.write_text(f"# our people\none sha256:{hash_key(one)}\n")
    async with running_front_door(api_keys=key_file) as door:
        assert await is_let_in(door, one)
        assert not await is_let_in(door, two)
        key_file.write_text(f"second sha256:{hash_key(two)}\n")
        assert not await is_let_in(door, one)
        assert await is_let_in(door, two)
        key_file.write_text("half a li")  # being written
        assert await is_let_in(door, two)
        key_file.unlink()
        assert await is_let_in(door, two)


async def test_health_needs_no_key(key_file: Path) -> None:
    key_file.write_text("")
    async with running_front_door(api_keys=key_file) as door, door.openai() as client:
        assert (await client.get("/../health", cast_to=object)) == {"status": "ok"}
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


def test_a_bad_key_file_is_told_with_its_line(key_file: Path) -> None:
    key_file.write_text("one sha256:" + "0" * 64 + " rpm=3\ntwo secret\n")
    with pytest.raises(InvalidRequest, match="line 2 of"):
        read_keys(key_file)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_keys(key_file.parent / "none")


def test_the_command_makes_a_key_and_keeps_its_hash_alone(key_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["api-key", "alice", "--file", str(key_file)]) == 0
    key = capsys.readouterr().out.strip()
    [entry] = read_keys(key_file).values()
    assert (entry.name, entry.sha256) == ("alice", hash_key(key))
    assert key not in key_file.read_text()
    assert key_file.stat().st_mode & 0o077 == 0
    assert run(["api-key", "alice", "--file", str(key_file)]) == 2
    assert run(["api-key", "two words", "--file", str(key_file)]) == 2
    assert run(["api-key", "bob", "--file", str(key_file.parent / "no" / "file")]) == 1


async def test_so_many_at_once_and_a_few_wait() -> None:
    async with running_front_door(key_max_concurrent=1, key_max_waiting=1) as door, door.openai() as client:
        door.target.hold(num_turns=1)
        first, second = ask(client), ask(client)
        await eventually(lambda: door.target.num_sessions == 1, "one is under way")
        with pytest.raises(openai.RateLimitError) as refused:
            await asyncio.gather(ask(client), ask(client))
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.type == "rate_limit_error"
        assert door.target.num_sessions == 1
        door.target.release()
        await asyncio.gather(first, second, return_exceptions=True)
        await ask(client)  # the places are free again


async def test_who_waits_for_too_long_is_told_so() -> None:
    async with running_front_door(key_max_concurrent=1, key_max_wait_s=0.05) as door, door.openai() as client:
        door.target.hold(num_turns=1)
        first = ask(client)
        await eventually(lambda: door.target.num_sessions == 1, "one is under way")
        with pytest.raises(openai.RateLimitError, match=r"within 0\.05 s"):
            await ask(client)
        door.target.release()
        await first


async def test_so_many_in_a_minute_by_key(key_file: Path) -> None:
    few, many = make_key(), make_key()
    key_file.write_text(f"few sha256:{hash_key(few)} rpm=2\nmany sha256:{hash_key(many)}\n")
    async with (
        running_front_door(api_keys=key_file, key_max_wait_s=0.05) as door,
        door.openai(api_key=few) as few_client,
        door.openai(api_key=many) as many_client,
    ):
        await ask(few_client)
        await ask(few_client)
        with pytest.raises(openai.RateLimitError, match="2 requests a minute"):
            await ask(few_client)
        for _ in range(3):
            await ask(many_client)


MANY = 50_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1.5] * MANY}),
        ("/v1/completions", {"prompt": [[1], *["a"] * MANY]}),
        ("/v1/completions", {"prompt": PROMPT, "stop": [1] * MANY}),
        ("/v1/completions", {"prompt": PROMPT, "bad_words": [1] * MANY}),
        ("/v1/completions", {"prompt": PROMPT, "stop_token_ids": ["a"] * MANY}),
        ("/v1/completions", {"prompt": PROMPT, "guided_choice": [1] * MANY}),
        ("/v1/completions", {"prompt": PROMPT, "logit_bias": {str(index): "a" for index in range(MANY)}}),
        ("/v1/completions", {"prompt": PROMPT, **{f"unknown{index}": 1 for index in range(MANY)}}),
        ("/v1/completions", {"prompt": PROMPT, "x" * MANY: 1}),
        ("/v1/chat/completions", {"messages": [1] * MANY}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        ("/detokenize", {"tokens": ["a"] * MANY}),
    ],
    ids=lambda value: f"{value}"[:40],
)
async def test_a_body_of_mistakes_is_refused_in_few_words(web: httpx.AsyncClient, path: str, body: object) -> None:
    """To tell of a million took a minute, in which nobody else was served, and a hundred megabytes."""
    answer = await web.post(path, json=body)
    assert answer.status_code == 400
    assert len(answer.content) < 2_000
