"""Processes begin, break and end; nothing is left behind, and no token changes."""

from __future__ import annotations

import asyncio
import json
import signal
import time

import psutil

from outrider.client import Client, Event, Speculation, Tokens, collect
from outrider.launcher import LocalStack, StackOptions
from tests.e2e.conftest import Models
from tests.e2e.processes import Up, dispose, outrider, running_up, start_up

PROMPT = "class Parser:"


async def test_killing_the_draft_worker_changes_no_token(up: Up) -> None:
    async with Client(up.address) as client:
        plain = await client.complete(PROMPT, max_tokens=300, ignore_eos=True, speculation=Speculation(disabled=True))
        drafter = up.child("draft-worker")
        events: list[Event] = []
        killed = False
        async for event in client.generate(PROMPT, max_tokens=300, ignore_eos=True):
            events.append(event)
            if not killed and isinstance(event, Tokens) and any(token.drafted for token in event.tokens):
                drafter.kill()
                killed = True
        answer = collect(events)

        assert answer.token_ids == plain.token_ids
        assert answer.text == plain.text
        assert answer.speculation.num_accepted > 0
        assert answer.speculation.num_draft_losses >= 1

        await eventually_drafting(client)
        again = await client.complete(PROMPT, max_tokens=32, speculation=Speculation(policy="fixed", k=4, turns=True))

    assert again.speculation.num_accepted > 0


async def eventually_drafting(client: Client, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (await client.model()).num_drafters == 0:
        assert time.monotonic() < deadline, "the draft worker did not come back"
        await asyncio.sleep(0.2)


def test_ctrl_c_leaves_no_process_behind(models: Models) -> None:
    with running_up("--target", models.target, "--draft", models.twin) as up:
        assert len(up.children) == 3

        exit_code, alive = up.end(signal.SIGINT)
        assert up.process.stderr is not None
        said = up.process.stderr.read()

    assert (exit_code, alive) == (130, [])
    assert "stopping" in said


def test_ctrl_c_while_models_load_leaves_no_process_behind(models: Models) -> None:
    process = start_up("--target", models.target, "--draft", models.twin)
    try:
        assert process.stderr is not None
        assert "loading" in process.stderr.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        exit_code = process.wait(timeout=20)
        _, alive = psutil.wait_procs(children, timeout=15)
    finally:
        dispose(process)

    assert len(children) >= 1
    assert (exit_code, alive) == (130, [])


def test_children_die_with_a_killed_parent(models: Models) -> None:
    with running_up("--target", models.target, "--no-draft") as up:
        assert len(up.children) == 2

        exit_code, alive = up.end(signal.SIGKILL)

    assert (exit_code, alive) == (-signal.SIGKILL, [])


def test_a_lost_target_ends_the_stack_with_its_reason(models: Models) -> None:
    with running_up("--target", models.target, "--no-draft") as up:
        children = up.children
        up.child("target-worker").kill()
        exit_code = up.process.wait(timeout=20)
        assert up.process.stderr is not None
        errors = up.process.stderr.read()
        _, alive = psutil.wait_procs(children, timeout=15)

    assert (exit_code, alive) == (1, [])
    assert "outrider: target-worker was killed by SIGKILL" in errors


async def test_the_stack_as_a_context_manager(models: Models) -> None:
    async with LocalStack(StackOptions(target=models.target, draft=None)) as stack:
        pids = list(stack.pids.values())
        async with Client(stack.address) as client:
            answer = await client.complete(PROMPT, max_tokens=8)

    assert len(pids) == 2
    assert len(answer.token_ids) <= 8
    assert answer.speculation.num_drafted == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_demo_prints_one_object(models: Models) -> None:
    outcome = outrider(
        "demo", "--json", "--target", models.target, "--draft", models.twin, "--max-tokens=24", "--repeats=1"
    )

    assert outcome.exit_code == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    assert report["tokens_equal"] is True
    assert 0 <= report["acceptance_rate"] <= 1
    assert report["mean_acceptance_length"] >= 1
    assert report["speedup"] > 0
    assert report["completion_tokens"] <= 24
