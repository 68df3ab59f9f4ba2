"""Bad input: one line that says what is wrong, exit code 2, and nothing else disturbed."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from outrider.client import Client
from rpc.errors import InvalidRequest
from tests.e2e.conftest import MAX_CONTEXT, Models
from tests.e2e.processes import Up, one_line_of, outrider, python

PROMPT = "import os"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature=-1", PROMPT], "temperature"),
        (["--temperature=nan", PROMPT], "temperature"),
        (["--temperature=inf", PROMPT], "temperature"),
        (["--top-p=0", PROMPT], "top_p"),
        (["--top-p=1.5", PROMPT], "top_p"),
        (["--top-p=nan", PROMPT], "top_p"),
        (["--top-k=-1", PROMPT], "top_k"),
        (["--max-tokens=0", PROMPT], "max_tokens"),
        (["--max-tokens=-3", PROMPT], "max_tokens"),
        (["--k=-1", PROMPT], "speculation.k"),
        (["--k=65", PROMPT], "speculation.k"),
        (["--policy=hope", PROMPT], "--policy"),
        (["--seed=-1", PROMPT], "seed"),
        (["--model=gpt-9", PROMPT], "gpt-9"),
        ([""], "prompt"),
        (["qz" * MAX_CONTEXT], "prompt"),
        (["--file=/no/such/file"], "/no/such/file"),
    ],
    ids=lambda value: value[0][:24] if isinstance(value, list) else "",
)
def test_generate_refuses(up: Up, arguments: list[str], named: str) -> None:
    outcome = outrider("generate", "--address", up.address, *arguments)

    assert outcome.exit_code == 2, outcome
    assert outcome.stdout == ""
    assert named in one_line_of(outcome.stderr)


@pytest.mark.parametrize("stdin", ["", b"\xff\xfe"])
def test_generate_refuses_standard_input(up: Up, stdin: str | bytes) -> None:
    outcome = outrider("generate", "--address", up.address, stdin=stdin)

    assert outcome.exit_code == 2, outcome
    one_line_of(outcome.stderr)


@pytest.mark.parametrize("prompt", [[], [-1], [280], [2**40]])
async def test_the_client_names_the_field(up: Up, prompt: list[int]) -> None:
    async with Client(up.address) as client:
        with pytest.raises(InvalidRequest) as caught:
            await client.complete(prompt)

    assert "tokens" in str(caught.value) or "prompt" in str(caught.value)


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

    outcome = outrider("generate", "--address", f"127.0.0.1:{port}", PROMPT)

    assert outcome.exit_code == 1
    assert "outrider up" in one_line_of(outcome.stderr)


def test_up_on_a_port_in_use(models: Models) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        outcome = outrider("up", "--target", models.target, "--no-draft", f"--grpc-port={port}")

    assert outcome.exit_code == 2
    assert str(port) in one_line_of(outcome.stderr)


def test_a_worker_on_a_port_in_use(models: Models) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        outcome = outrider("target-worker", "--model", models.target, f"--port={port}")

    assert outcome.exit_code == 2
    assert str(port) in one_line_of(outcome.stderr)


@pytest.mark.parametrize("folder", ["missing", "empty"])
@pytest.mark.parametrize(
    ("command", "flag"), [("up", "--target"), ("doctor", "--draft"), ("target-worker", "--model"), ("bench", "--draft")]
)
def test_a_path_that_is_no_model(tmp_path: Path, folder: str, command: str, flag: str) -> None:
    """It is told at once: nothing that loads models has been imported."""
    (tmp_path / "empty").mkdir()
    code = "import sys; from outrider.cli import run; exit_code = run(sys.argv[1:]); print('torch' in sys.modules)"

    outcome = python(f"{code}; sys.exit(exit_code)", command, flag, str(tmp_path / folder))

    assert (outcome.exit_code, outcome.stdout) == (2, "False\n")
    line = one_line_of(outcome.stderr)
    assert str(tmp_path / folder) in line
    assert flag in line


def test_a_model_that_cannot_be_read(models: Models, tmp_path: Path) -> None:
    """Whoever starts the workers says what one of them could not."""
    (tmp_path / "config.json").write_text("{")

    outcome = outrider("up", "--target", str(tmp_path), "--draft", models.twin, "--grpc-port=0")

    assert outcome.exit_code == 2
    last_line = outcome.stderr.splitlines()[-1]
    assert last_line.startswith("outrider: target-worker: ")
    assert str(tmp_path) in last_line
    assert "Traceback" not in outcome.stderr


def test_models_with_different_vocabularies(models: Models) -> None:
    outcome = outrider("up", "--target", models.target, "--draft", models.foreign, "--grpc-port=0")

    assert outcome.exit_code == 2
    assert "different vocabularies" in outcome.stderr.splitlines()[-1]
    assert "Traceback" not in outcome.stderr


def test_an_unknown_key_in_the_file(tmp_path: Path) -> None:
    config = tmp_path / "outrider.toml"
    config.write_text("[up]\nspeed = 11\n")

    outcome = outrider("up", "--config", str(config))

    assert outcome.exit_code == 2
    assert "speed" in one_line_of(outcome.stderr)
