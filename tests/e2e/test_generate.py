"""What users run: one prompt in, the target's own text out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from outrider.client import Client, Finished, Speculation, Started, Token, Tokens
from tests.e2e.conftest import MAX_CONTEXT, Models
from tests.e2e.processes import Up, outrider, outrider_on_terminal, running_up

PROMPT = "def fibonacci(n):"


def generate_json(up: Up, *arguments: str) -> dict[str, Any]:
    outcome = outrider("generate", "--address", up.address, "--json", "--max-tokens=48", *arguments)
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    answer: dict[str, Any] = json.loads(outcome.stdout)
    return answer


def test_json_is_the_same_with_and_without_speculation(up: Up) -> None:
    fast = generate_json(up, PROMPT)
    plain = generate_json(up, "--no-speculation", PROMPT)

    assert fast["token_ids"] == plain["token_ids"]
    assert fast["text"] == plain["text"]
    assert fast["finish_reason"] == plain["finish_reason"]
    assert fast["usage"] == plain["usage"]
    assert fast["usage"]["completion_tokens"] == len(fast["token_ids"])
    assert fast["speculation"]["num_accepted"] > 0
    assert plain["speculation"]["num_drafted"] == 0


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
async def test_every_policy_gives_the_tokens_of_plain_decoding(up: Up, temperature: float, top_p: float) -> None:
    async with Client(up.address) as client:
        answers = [
            await client.complete(
                PROMPT, max_tokens=40, temperature=temperature, top_p=top_p, seed=17, speculation=speculation
            )
            for speculation in (
                Speculation(disabled=True),
                Speculation(policy="goodput"),
                Speculation(policy="threshold"),
                Speculation(policy="fixed", k=0),
                Speculation(policy="fixed", k=1),
                Speculation(policy="fixed", k=8),
            )
        ]

    assert len({answer.token_ids for answer in answers}) == 1
    # Of all, as one takes a tenth of a second: where others keep the drafter from its core it has nothing in time.
    assert sum(answer.speculation.num_accepted for answer in answers) > 0
    assert any(any(answer.drafted) for answer in answers)


async def test_requests_side_by_side_give_what_each_gives_alone(up: Up) -> None:
    prompts = [f"{letter} = {number}" for number, letter in enumerate("abcdef")]

    async with Client(up.address) as client:
        alone = [await client.complete(prompt, max_tokens=24, temperature=0.9, seed=5) for prompt in prompts]
        together = await asyncio.gather(
            *(client.complete(prompt, max_tokens=24, temperature=0.9, seed=5) for prompt in prompts)
        )

    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


async def test_a_drafter_that_is_always_wrong_changes_nothing(up: Up, models: Models) -> None:
    async with Client(up.address) as client:
        expected = await client.complete(PROMPT, max_tokens=32, temperature=0.8, seed=3)
    with running_up("--target", models.target, "--draft", models.stranger, "--policy=fixed", "--max-k=4") as other:
        async with Client(other.address) as client:
            answer = await client.complete(PROMPT, max_tokens=32, temperature=0.8, seed=3)

    assert answer.token_ids == expected.token_ids
    assert answer.speculation.acceptance_rate < 0.5


async def test_the_events_of_one_answer(up: Up) -> None:
    async with Client(up.address) as client:
        events = [event async for event in client.generate(PROMPT, max_tokens=20, ignore_eos=True)]

    assert isinstance(events[0], Started)
    assert 0 < events[0].prompt_tokens <= len(PROMPT)
    steps = events[1:-1]
    assert all(isinstance(step, Tokens) for step in steps)
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.finish_reason == "length"
    assert sum(len(step.tokens) for step in steps if isinstance(step, Tokens)) == 20
    own = [step.tokens[-1] for step in steps if isinstance(step, Tokens)]
    assert all(isinstance(token, Token) for token in own)


async def test_leaving_the_iteration_frees_the_place(up: Up) -> None:
    async with Client(up.address) as client:
        events = client.generate(PROMPT, max_tokens=1500, ignore_eos=True)
        await anext(events)
        await events.aclose()

        answer = await client.complete(PROMPT, max_tokens=4)

    assert len(answer.token_ids) <= 4


async def test_the_model_says_what_serves(up: Up, models: Models) -> None:
    async with Client(up.address) as client:
        model = await client.model()

    assert model.name == models.target
    assert model.draft_models == (models.cousin,)
    assert (model.num_targets, model.num_drafters) == (1, 1)
    assert model.max_context == MAX_CONTEXT


def test_prompt_by_argument_file_and_standard_input(up: Up, tmp_path: Path) -> None:
    file = tmp_path / "prompt.py"
    file.write_text(PROMPT)
    options = ("generate", "--address", up.address, "--max-tokens=8")

    by_argument = outrider(*options, PROMPT)
    by_file = outrider(*options, "--file", str(file))
    by_stdin = outrider(*options, stdin=PROMPT)

    assert by_argument.exit_code == 0
    assert by_argument == by_file == by_stdin


def test_a_pipe_gets_the_text_and_nothing_else(up: Up) -> None:
    expected = generate_json(up, PROMPT)["text"]

    outcome = outrider("generate", "--address", up.address, "--max-tokens=48", PROMPT)

    assert outcome.stdout.removesuffix("\n") == expected.removesuffix("\n")
    assert outcome.stderr == ""


def test_a_terminal_shows_drafted_and_target_tokens_apart(up: Up) -> None:
    shown = outrider_on_terminal("generate", "--address", up.address, "--max-tokens=16", PROMPT)

    assert "drafted and accepted" in shown
    assert PROMPT in shown
    assert "\x1b[32m" in shown  # drafted: green
    assert "\x1b[1;4m" in shown  # the target's own: bold, underlined
    assert "tokens per step" in shown


def test_environment_and_file_stand_in_for_flags(up: Up, tmp_path: Path) -> None:
    config = tmp_path / "outrider.toml"
    config.write_text(f'[generate]\naddress = "{up.address}"\nmax_tokens = 3\njson = true\n')

    from_file = outrider("generate", "--config", str(config), PROMPT)
    variable = outrider("generate", "--config", str(config), PROMPT, environment={"OUTRIDER_GENERATE_MAX_TOKENS": "5"})
    flag = outrider(
        "generate",
        "--config",
        str(config),
        "--max-tokens=7",
        PROMPT,
        environment={"OUTRIDER_GENERATE_MAX_TOKENS": "5"},
    )

    lengths = [len(json.loads(outcome.stdout)["token_ids"]) for outcome in (from_file, variable, flag)]
    assert lengths == [3, 5, 7]
