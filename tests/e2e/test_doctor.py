"""``outrider doctor`` on tiny models, once as a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Models
from tests.e2e.processes import one_line_of, outrider, outrider_here

SMALL = ("--prompts=2", "--max-tokens=12", "--max-k=3", "--kv-tokens=2048", "--threads=1")


def test_a_pair_is_examined(models: Models) -> None:
    outcome = outrider("doctor", f"--target={models.cousin}", f"--draft={models.twin}", "--json", *SMALL)

    assert outcome.exit_code == 0, outcome
    found = json.loads(outcome.stdout)
    assert {finding["level"] for finding in found["findings"]} == {"ok"}
    assert [len(one["by_k"]) for one in found["predictions"]] == [3, 3]
    assert all(one["num_tokens"] == 2 * 11 for one in found["verified"])
    assert not any(one["divergences"] for one in found["verified"])
    assert found["memory"][0]["pool_bytes"] == 2048 * found["memory"][0]["kv_bytes_per_token"]


def test_the_tables_fit_100_columns(models: Models) -> None:
    outcome = outrider_here("doctor", f"--target={models.twin}", f"--draft={models.twin}", "--temperatures=0", *SMALL)

    assert outcome.exit_code == 0, outcome
    assert max(map(len, outcome.stdout.splitlines())) <= 100
    assert "are those of plain decoding, in float32" in outcome.stdout


def test_different_vocabularies_are_named_and_nothing_is_run(models: Models) -> None:
    outcome = outrider_here("doctor", f"--target={models.twin}", f"--draft={models.foreign}", *SMALL)

    assert outcome.exit_code == 1, outcome
    assert "problem" in outcome.stdout
    assert "Speedup" not in outcome.stdout
    last_line = outcome.stderr.splitlines()[-1]
    assert "different vocabularies" in last_line
    assert "trained with the target's tokenizer" in last_line


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_model_that_cannot_be_read(models: Models, tmp_path: Path, role: str) -> None:
    (tmp_path / "config.json").write_text("{")
    paths = {"target": models.twin, "draft": models.twin, role: str(tmp_path)}
    outcome = outrider_here("doctor", f"--target={paths['target']}", f"--draft={paths['draft']}", *SMALL)

    assert outcome.exit_code == 2, outcome
    assert "Traceback" not in outcome.stderr
    assert f"{role}: {tmp_path}" in outcome.stderr.splitlines()[-1]


def test_a_pool_that_is_too_small(models: Models) -> None:
    outcome = outrider_here("doctor", f"--target={models.twin}", f"--draft={models.twin}", *SMALL, "--kv-tokens=64")

    assert outcome.exit_code == 2, outcome
    assert "--kv-tokens" in outcome.stderr.splitlines()[-1] or "--max-tokens" in outcome.stderr.splitlines()[-1]


def test_a_dtype_that_is_none(models: Models) -> None:
    outcome = outrider_here("doctor", f"--target={models.twin}", f"--draft={models.twin}", "--dtype=int3", *SMALL)

    assert outcome.exit_code == 2, outcome
    assert "int3" in one_line_of(outcome.stderr)
