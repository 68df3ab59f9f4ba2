"""The command line without any process behind it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic_settings import BaseSettings

from coordinator.settings import CoordinatorSettings
from draft_worker.settings import DraftWorkerSettings
from outrider import cli
from outrider.launcher import share_of_cores
from outrider.settings import DemoSettings, GenerateSettings, UpSettings
from target_worker.settings import TargetWorkerSettings


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0

    shown = capsys.readouterr().out
    assert all(name in shown for name in ("demo", "up", "generate", "coordinator", "draft-worker", "target-worker"))


@pytest.mark.parametrize(
    "settings",
    [DemoSettings, UpSettings, GenerateSettings, CoordinatorSettings, DraftWorkerSettings, TargetWorkerSettings],
)
def test_every_flag_says_what_it_does(settings: type[BaseSettings]) -> None:
    assert [name for name, field in settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    "command", ["demo", "up", "generate", "simulate", "coordinator", "draft-worker", "target-worker"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0

    shown = capsys.readouterr().out
    assert f"OUTRIDER_{command.removesuffix('-worker').upper()}_" in shown
    assert "--config" in shown
    assert "--status-json" not in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0

    assert capsys.readouterr().out.startswith("outrider ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fly"], "fly"),
        (["up", "--speed"], "--speed"),
        (["up", "--grpc-port", "99999"], "--grpc-port"),
        (["up", "--grpc-port", "many"], "--grpc-port"),
        (["up", "--policy", "hope"], "--policy"),
        (["up", "--draft", "m"], "--target"),
        (["up", "--target", "m"], "--no-draft"),
        (["target-worker"], "--model"),
        (["coordinator"], "--target"),
        (["generate", "--file", "/no/such/file"], "/no/such/file"),
        (["generate", "--file", "/no/such/file", "prompt"], "--file"),
        (["generate", "--max-tokens", "lots", "prompt"], "--max-tokens"),
        (["generate", "--n", "2", "prompt"], "add --json"),
        (["generate", "--logprobs", "0", "prompt"], "--logprobs: logprobs are told in JSON only; add --json"),
        (["generate", "--prompt-logprobs", "3", "prompt"], "--prompt-logprobs: logprobs are told in JSON only"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert line.startswith("outrider: ")
    assert named in line


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, outrider.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("num_cores", [1, 2, 3, 4, 8, 16, 64])
def test_both_models_have_cores_of_their_own(num_cores: int) -> None:
    target, draft = share_of_cores(num_cores, drafting=True)

    assert 1 <= draft <= target
    assert target + draft <= max(2, num_cores)


def test_two_cores_are_one_each() -> None:
    assert share_of_cores(2, drafting=True) == (1, 1)
    assert share_of_cores(2, drafting=False) == (1, 0)
