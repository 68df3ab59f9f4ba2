"""``outrider simulate``: sweeps, the table, the JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outrider import cli
from outrider.simulate.settings import SimulateSettings
from outrider.simulate.sweep import IDEAL, PLAIN, Condition, Sweep, conditions, scenario_of

SMALL = ["simulate", "--sessions", "2", "--max-tokens", "16", "--processes", "1"]


def small(**values: object) -> SimulateSettings:
    return SimulateSettings(**{"sessions": 2, "max_tokens": 16, "processes": 1, **values})  # type: ignore[arg-type]


def test_every_combination_is_a_condition() -> None:
    settings = small(latency_ms="0,5", acceptance="0.5,0.9/0.4", concurrency="1,4")
    assert len(conditions(settings)) == 8
    assert Condition(5.0, "0.9/0.4", 4) in conditions(settings)


def test_flags_reach_the_scenario() -> None:
    settings = small(
        target_latency_ms=2, client_latency_ms=3, jitter=0.1, target_ms=10, draft_token_ms=4, targets=2, drafters=3
    )
    scenario = scenario_of(settings, Condition(7.0, "0.9/0.4", 5), "turns")
    assert scenario.turns
    assert scenario.policy == "fixed"
    assert (scenario.latencies.draft_s, scenario.latencies.target_s, scenario.latencies.client_s) == (
        0.007,
        0.002,
        0.003,
    )
    assert (scenario.target.base_s, scenario.draft.token_s, scenario.load.concurrency) == (0.010, 0.004, 5)
    assert (scenario.num_targets, scenario.num_drafters) == (2, 3)
    assert scenario_of(settings, Condition(7.0, "0.9", 5), "goodput").policy == "goodput"


def test_what_cannot_differ_is_simulated_once() -> None:
    sweep = Sweep(small(latency_ms="0,5,20", systems="goodput"))
    assert sweep.num_runs == 3 + 2


def test_processes_change_nothing() -> None:
    settings = small(latency_ms="5", systems="goodput", deployments=3)
    told: list[None] = []
    alone = Sweep(settings).run(lambda: told.append(None))
    together = Sweep(settings.model_copy(update={"processes": 2})).run()
    assert alone == together
    assert len(told) == 9
    assert {cell.system for cell in alone} == {PLAIN, "goodput", IDEAL}
    assert all(cell.report.num_sessions == 6 for cell in alone)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert cli.run([*SMALL, "--latency-ms", "0,5", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("plain", "goodput", "turns", "ideal", "caught"))

    whole = json.loads(file.read_text())
    assert whole["settings"]["latency_ms"] == "0,5"
    assert len(whole["cells"]) == 2 * 6
    plain = next(cell for cell in whole["cells"] if cell["system"] == "plain")
    assert plain["ratio_to_plain"] == 1.0
    assert plain["mean_acceptance_length"] == 1.0
    assert plain["counts"]["num_tokens"] == 32


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--latency-ms", "-1"], "--latency-ms"),
        (["--latency-ms", "far"], "--latency-ms"),
        (["--acceptance", "1.5"], "--acceptance"),
        (["--acceptance", "0.5//0.4"], "--acceptance"),
        (["--concurrency", "0"], "--concurrency"),
        (["--concurrency", ","], "--concurrency"),
        (["--systems", "hope"], "--systems"),
        (["--target-ms", "0"], "--target-ms"),
        (["--draft-ms", "nan"], "--draft-ms"),
        (["--sessions", "0"], "--sessions"),
        (["--json", "/nowhere/at/all.json"], "--json"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*SMALL, *arguments]) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") == 1
