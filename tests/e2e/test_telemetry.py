"""Metrics, logs and traces of real processes."""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from outrider.client import Client, Speculation
from tests.e2e.conftest import Models
from tests.e2e.processes import one_line_of, outrider, running_up

SPECULATING = Speculation(policy="fixed", k=4, turns=True)  # certain to have drafts on any machine
CONFIG = """
[coordinator]
metrics_port = 0
log_format = "json"
log_level = "info"
[target]
metrics_port = 0
[draft]
metrics_port = 0
"""


def scrape(url: str) -> dict[str, float]:
    """Sums by sample name."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(url).text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


async def test_three_processes_tell_the_same_story(models: Models, tmp_path: Path) -> None:
    config = tmp_path / "outrider.toml"
    config.write_text(CONFIG)
    with running_up("--target", models.target, "--draft", models.twin, f"--config={config}") as up:
        assert up.process.stderr is not None
        urls: dict[str, str] = {}
        while len(urls) < 3:
            if told := re.match(r"(\S+): metrics at (\S+)", up.process.stderr.readline()):
                urls[told[1]] = told[2]
        async with Client(up.address) as client:
            answer = await client.complete("import os", max_tokens=48, ignore_eos=True, speculation=SPECULATING)
        coordinator, target, draft = (scrape(urls[role]) for role in ("coordinator", "target-worker", "draft-worker"))
        exit_code, alive = up.end(signal.SIGTERM)
        rest = up.process.stderr.read()

    assert (exit_code, alive) == (143, [])
    stats = answer.speculation
    assert coordinator["outrider:generation_tokens_total"] == 48
    assert coordinator["outrider:decode_steps_total"] == stats.num_steps
    assert coordinator["outrider:spec_decode_num_draft_tokens_total"] == stats.num_drafted
    assert coordinator["outrider:spec_decode_num_accepted_tokens_total"] == stats.num_accepted > 0
    assert target["outrider:step_seconds_count"] == stats.num_steps
    assert draft["outrider:drafted_tokens_total"] >= stats.num_drafted
    assert all(told["process_cpu_seconds_total"] > 0 for told in (coordinator, target, draft))
    logged = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
    [over] = [entry for entry in logged if entry["event"] == "request over"]
    assert (over["role"], over["num_accepted"], over["outcome"]) == ("coordinator", stats.num_accepted, "length")
    assert over["target"].startswith("127.0.0.1:")
    assert "import os" not in rest


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--metrics-port=70000", "--metrics-port"),
        ("--log-format=xml", "--log-format"),
        ("--log-level=loud", "--log-level"),
    ],
)
@pytest.mark.parametrize("command", [["coordinator", "--target=127.0.0.1:1"], ["draft-worker", "--model=m"]])
def test_bad_settings_are_one_line(command: list[str], flag: str, named: str) -> None:
    outcome = outrider(*command, flag)

    assert outcome.exit_code == 2
    assert named in one_line_of(outcome.stderr)


@pytest.mark.parametrize("share", ["-0.1", "1.1", "nan", "half"])
def test_a_share_is_from_0_to_1(share: str) -> None:
    outcome = outrider("coordinator", "--target=127.0.0.1:1", f"--plain-share={share}")

    assert outcome.exit_code == 2
    assert "--plain-share" in one_line_of(outcome.stderr)


def test_a_metrics_port_in_use_is_told_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = outrider("coordinator", "--port=0", "--target=127.0.0.1:1", f"--metrics-port={port}")

    assert outcome.exit_code == 2
    assert f"port {port}" in one_line_of(outcome.stderr)
