"""``/metrics`` of the front door, and traces that begin at a client of it."""

from __future__ import annotations

import httpx
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from speculation.messages import OpenDraft, OpenTarget
from tests.doubles.samples import by_label, total
from tests.http.conftest import PROMPT, FrontDoor

SENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_it_counts_what_came_through_this_door(client: AsyncOpenAI, web: httpx.AsyncClient) -> None:
    answer = await client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=20, temperature=0)

    families = text_string_to_metric_families((await web.get("/metrics")).text)
    samples = [sample for family in families for sample in family.samples]
    tokens = sum(sample.value for sample in samples if sample.name == "outrider:generation_tokens_total")
    assert answer.usage is not None
    assert tokens == answer.usage.completion_tokens > 0
    assert ("outrider:worker_up", 1.0) in [(sample.name, sample.value) for sample in samples]


async def test_a_traceparent_reaches_both_workers(front_door: FrontDoor, client: AsyncOpenAI) -> None:
    headers = {"traceparent": SENT}
    for stream in (False, True):
        answer = await client.completions.create(
            model="toy-target", prompt=PROMPT, max_tokens=20, temperature=0, stream=stream, extra_headers=headers
        )
        if stream:
            assert [chunk async for chunk in answer]  # type: ignore[union-attr]
    await client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=3, temperature=0)

    opened = [command for command in front_door.target.commands if isinstance(command, OpenTarget)]
    assert [command.trace_context for command in opened] == [SENT, SENT, ""]
    drafting = [command for command in front_door.drafter.commands if isinstance(command, OpenDraft)]
    assert [command.trace_context for command in drafting][:2] == [SENT, SENT]


async def test_a_stop_string_is_a_good_end_and_every_choice_counts(front_door: FrontDoor, client: AsyncOpenAI) -> None:
    plain = await client.completions.create(model="toy-target", prompt=PROMPT, max_tokens=20, temperature=0)
    stop = plain.choices[0].text[5]
    registry = front_door.coordinator.metrics.registry
    before = by_label(registry, "request_success_total", "finished_reason")

    answer = await client.completions.create(
        model="toy-target", prompt=PROMPT, max_tokens=20, temperature=0, stop=[stop], n=3
    )

    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 3
    after = by_label(registry, "request_success_total", "finished_reason")
    assert after["stop"] - before["stop"] == 3
    assert total(registry, "request_failure_total") == 0
