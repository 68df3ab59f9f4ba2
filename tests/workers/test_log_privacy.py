"""No prompt and no output is in any log line of any level, unless it was asked for."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from outrider.client import Client, Completion, Speculation, Tokens
from rpc.errors import InvalidRequest, OutriderError
from speculation.relay import RelaySession
from telemetry.logs import configure_logs
from tests.doubles.eventually import eventually
from tests.workers.deployment import Deployment, deployment

PROMPT = "zebra quartz"
SPECULATING = Speculation(policy="fixed", k=3, turns=True)


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """All records of all loggers, as JSON lines."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logs("json", "debug", {"role": "test"}, stream)
    for name in ("asyncio", "grpc", "httpx", "uvicorn"):  # theirs too, although nobody would see them
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def entries(lines: io.StringIO, event: str) -> list[dict[str, object]]:
    parsed = [json.loads(line) for line in lines.getvalue().splitlines()]
    return [entry for entry in parsed if entry["event"] == event]


async def answered_cancelled_and_refused(running: Deployment) -> Completion:
    async with Client(running.address) as client:
        answer = await client.complete(PROMPT, max_tokens=24, speculation=SPECULATING)
        events = client.generate(PROMPT, max_tokens=200, ignore_eos=True)
        async for event in events:
            if isinstance(event, Tokens):
                break
        await events.aclose()
        with pytest.raises(InvalidRequest):
            await client.complete(PROMPT, max_tokens=0)
    return answer


async def test_neither_prompt_nor_output(make_runtime, model_folders, lines: io.StringIO) -> None:
    async with deployment(make_runtime, model_folders) as running:
        answer = await answered_cancelled_and_refused(running)
        await eventually(lambda: len(entries(lines, "request over")) == 2, "both requests over")
        prompt_ids = running.coordinator._served().tokenizer.encode(PROMPT).ids
    said = lines.getvalue()

    for part in ("zebra", "quartz", answer.text, json.dumps(answer.text)[1:-1]):
        assert part not in said
    for ids in (prompt_ids, list(answer.token_ids)):
        for separator in (", ", ","):
            assert separator.join(map(str, ids[:4])) not in said
    accepted, over = entries(lines, "request accepted"), entries(lines, "request over")
    assert [entry["outcome"] for entry in over] == [answer.finish_reason, "CANCELLED"]
    assert [(e["request_id"], e["session_id"]) for e in accepted] == [(e["request_id"], e["session_id"]) for e in over]
    assert over[0]["num_accepted"] == answer.speculation.num_accepted
    opened = entries(lines, "session opened")
    assert {entry["session_id"] for entry in opened} == {entry["session_id"] for entry in over}


async def test_a_defect_tells_where_and_not_with_what(
    make_runtime, model_folders, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(relay: RelaySession, *event: object) -> None:
        text = "".join(map(chr, relay.token_ids))
        raise RuntimeError(f"a defect after {len(text)} tokens")

    monkeypatch.setattr(RelaySession, "on_target_event", fail)
    async with deployment(make_runtime, model_folders) as running, Client(running.address) as client:
        with pytest.raises(OutriderError):
            await client.complete(PROMPT, max_tokens=4)

    [entry] = entries(lines, "session failed")
    assert "in fail" in str(entry["exception"])
    assert entry["request_id"]
    assert "zebra" not in lines.getvalue()


async def test_prompt_and_output_when_asked_for(make_runtime, model_folders, lines: io.StringIO) -> None:
    async with deployment(make_runtime, model_folders, log_prompts=True) as running:
        answer = await answered_cancelled_and_refused(running)
        await eventually(lambda: len(entries(lines, "request over")) == 2, "both requests over")

    assert [entry["prompt"] for entry in entries(lines, "request accepted")] == [PROMPT] * 2
    assert entries(lines, "request over")[0]["output"] == answer.text
