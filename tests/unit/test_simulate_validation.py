"""Simulated against measured: what is read, what is simulated, and what costs are made of."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from outrider import cli
from outrider.failures import BadUsage
from outrider.simulate.calibration import Calibration, WorkerCosts, relay_s
from outrider.simulate.in_service import Steps, costs_of
from outrider.simulate.measured import DEFAULT_K, DEFAULT_POLICY, Measured, measured_cells, read_bench
from outrider.simulate.validation import CELLS, Comparison, compare, scenario_of, validation_object, with_busy_drafter
from speculation.messages import StepReport
from speculation.simulator import Costs, RecordedText, simulate

TARGET = WorkerCosts(Costs(0.0, points=((1, 0.010), (9, 0.014))), hop_s=0.0005)
DRAFT = WorkerCosts(Costs(0.001, 0.0001), hop_s=0.0005)


def made_up(*foreseen: bool) -> RecordedText:
    """64 tokens without a repetition."""
    guesses = itertools.islice(itertools.cycle(foreseen), 64)
    return RecordedText(tuple(range(100, 120)), tuple(range(64)), tuple(guesses))


CALIBRATION = Calibration(
    target_alone=TARGET,
    target_beside=TARGET,
    draft_alone=DRAFT,
    draft_beside=DRAFT,
    coordinator_s=0.0001,
    texts=(made_up(True, True, False, True), made_up(True, False)),
    num_prompt_tokens=20,
    num_output_tokens=64,
)
PLAIN = Measured("plain", None, 0, 1, 0.0, 64, num_runs=4, tokens_per_s=100.0)
OUTRIDER = Measured("outrider", "goodput", 6, 1, 0.0, 64, num_runs=4, tokens_per_s=200.0)


def cell(system: str, **values: object) -> dict[str, object]:
    return {
        "system": system,
        "concurrency": 1,
        "one_way_latency_ms": 0.0,
        "temperature": 0.0,
        "mean_acceptance_length": 2.5,
        "speculation_counts": {"num_steps": 200},
        "num_runs": 5,
        "tokens_per_s": 123.0,
        **values,
    }


def bench(*cells: dict[str, object], **pair: object) -> dict[str, object]:
    return {"cells": list(cells), "pair": {"max_k": None, **pair}, "settings": {"max_tokens": 128}}


def test_cells_of_ours_are_read_and_others_left() -> None:
    whole = bench(
        cell("outrider"),
        cell("outrider-fixed-4", one_way_latency_ms=20.0),
        cell("plain", speculation_counts=None, mean_acceptance_length=None),
        cell("outrider", temperature=0.8),
        cell("outrider", wanted_acceptance=0.5),
        cell("transformers-plain"),
    )
    assert [(one.system, one.policy, one.k, one.latency_ms, one.num_tokens) for one in measured_cells(whole)] == [
        ("outrider", DEFAULT_POLICY, DEFAULT_K, 0.0, 100),
        ("outrider-fixed-4", "fixed", 4, 20.0, 100),
        ("plain", None, 0, 0.0, 128),
    ]
    (fixed,) = measured_cells(bench(cell("outrider"), policy="fixed", max_k=2))
    assert (fixed.policy, fixed.k) == ("fixed", 2)


@pytest.mark.parametrize("text", ["{}", "[]", "no json"])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(BadUsage, match="outrider bench"):
        read_bench(file)


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["simulate", "--validate", "--bench", "/nowhere.json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_cell_is_simulated_as_it_was_measured() -> None:
    far = scenario_of(replace(OUTRIDER, latency_ms=5.0, concurrency=4), CALIBRATION)
    assert far.latencies.draft_s == pytest.approx(0.0055)
    assert (far.load.concurrency, far.load.in_batches, far.policy) == (4, True, "goodput")
    assert scenario_of(replace(OUTRIDER, system="turns", policy="fixed"), CALIBRATION).turns
    assert scenario_of(PLAIN, CALIBRATION).policy is None


def test_plain_decoding_takes_what_its_steps_take() -> None:
    (found,) = compare([PLAIN], CALIBRATION)
    assert found.simulated_tokens_per_s == pytest.approx(100.0, rel=0.05)
    assert found.error == pytest.approx(found.simulated_tokens_per_s / 100 - 1)
    assert Comparison(PLAIN, 90.0).error == pytest.approx(-0.1)


def test_recorded_guesses_decide_what_is_accepted() -> None:
    wrong = replace(CALIBRATION, texts=(made_up(False),))
    assert simulate(scenario_of(OUTRIDER, wrong)).num_accepted == 0
    right = replace(CALIBRATION, texts=(made_up(True),))
    report = simulate(scenario_of(OUTRIDER, right))
    assert report.acceptance_rate > 0.95


def test_recorded_texts_are_what_is_said_and_looked_up() -> None:
    looping = replace(made_up(True, False), output=(5, 6, 7, 8) * 16)
    said: dict[int, Sequence[int]] = {}
    repeating = simulate(scenario_of(OUTRIDER, replace(CALIBRATION, texts=(looping,))), said.__setitem__)
    assert all(found == [token_id << 5 for token_id in looping.output] for found in said.values())
    distinct = simulate(scenario_of(OUTRIDER, replace(CALIBRATION, texts=(made_up(True, False),))))
    assert repeating.num_steps < 0.85 * distinct.num_steps


def test_what_is_written_tells_acceptance_and_no_text() -> None:
    written = validation_object(CALIBRATION, [Comparison(PLAIN, 90.0)], "outrider simulate --validate")
    calibration = written["calibration"]
    assert isinstance(calibration, dict)
    assert calibration["acceptance_by_prompt"] == [0.75, 0.5]
    assert "texts" not in calibration
    assert len(json.dumps(written)) < 2000


def test_the_drafter_is_stretched_until_it_drafts_as_much_as_was_seen() -> None:
    seen = simulate(scenario_of(replace(OUTRIDER, num_runs=2), CALIBRATION)).proposed_per_token
    slow = with_busy_drafter(replace(CALIBRATION, proposed_per_token=0.6 * seen))
    assert slow.draft_beside.costs.base_s > 1.3 * DRAFT.costs.base_s
    found = simulate(scenario_of(replace(OUTRIDER, num_runs=2), slow)).proposed_per_token
    assert found == pytest.approx(0.6 * seen, rel=0.2)  # it falls in steps: drafts leave once per step of the target
    assert with_busy_drafter(CALIBRATION) == CALIBRATION


def steps(*reports: tuple[float, int, int]) -> Steps:
    """From (seconds, sessions, tokens), with 1 ms between any two steps."""
    found, now_s = [], 0.0
    for step_s, num_sessions, num_tokens in reports:
        now_s += step_s + 0.001
        found.append((now_s, StepReport(step_s, num_sessions, num_tokens)))
    return Steps(found)


def test_costs_are_means_by_size() -> None:
    single = steps((0.5, 1, 90), *[(0.010, 1, 1), (0.012, 1, 2), (0.016, 1, 4)] * 5, (9.0, 1, 1), (0.011, 1, 3))
    several = steps(*[(0.022, 3, 4)] * 3)
    costs = costs_of([single], [several])
    assert costs.overhead_s == pytest.approx(0.001)
    assert costs.session_s == pytest.approx(0.003)
    assert [costs.step_s(n, 1) for n in (1, 2, 3, 4)] == pytest.approx([0.010, 0.012, 0.014, 0.016])
    assert costs.step_s(4, 3) == pytest.approx(0.022)
    assert costs.step_s(90, 1) == pytest.approx(0.5)


def test_a_size_that_was_hardly_seen_gives_way_to_those_that_were() -> None:
    disturbed = [(0.030, 1, 2)] * 5
    costs = costs_of([steps((0.5, 1, 90), *disturbed, *[(0.010, 1, 1), (0.012, 1, 3)] * 100)], [])
    assert [costs.step_s(n, 1) for n in (1, 2, 3)] == pytest.approx([0.010, 0.012857, 0.012857], abs=1e-5)


def test_relaying_takes_some_time_and_not_much() -> None:
    assert 1e-6 < relay_s() < 0.05


def test_what_is_validated_covers_latency_concurrency_k_and_turns() -> None:
    assert len({one.latency_ms for one in CELLS}) >= 3
    assert len({one.concurrency for one in CELLS}) >= 2
    assert {one.system for one in CELLS} == {"plain", "outrider", "turns"}
    assert len(CELLS) == len(set(CELLS)) >= 5
    assert json.dumps([one.name for one in CELLS])
