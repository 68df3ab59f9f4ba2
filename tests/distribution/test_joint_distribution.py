"""What every method commits has the target's distribution: joint, over three tokens, against exact enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from speculation.ratio import Rule, block, rejection
from tests.distribution.statistic import FALSE_ALARM_RATE, NUM_SAMPLES, p_value
from tests.distribution.table_world import (
    NUM_TOKENS,
    VOCAB_SIZE,
    CoupledWorld,
    Settings,
    TableWorld,
    cells,
    exact_joint,
    table,
)

TARGET = table(seed=1, spread=1.5)
DRAFTS: dict[str, Tensor] = {
    "good": TARGET + table(seed=2, spread=0.5),
    "bad": table(seed=3, spread=1.5),
    "opposite": -TARGET,
}

CASES = {
    "good T=0.5": ("good", Settings(0.5)),
    "good T=1": ("good", Settings(1.0)),
    "good T=1.5 p=0.9": ("good", Settings(1.5, top_p=0.9)),
    "bad T=0.5": ("bad", Settings(0.5)),
    "bad T=1": ("bad", Settings(1.0)),
    "bad T=1.5": ("bad", Settings(1.5)),
    "truncated T=0.5": ("good", Settings(0.5, top_n=2)),
    "truncated T=1 p=0.9": ("good", Settings(1.0, top_p=0.9, top_n=2)),
    "truncated T=1.5": ("bad", Settings(1.5, top_n=3)),
    "greedy draft T=1": ("good", Settings(1.0, top_n=1)),
    "opposite T=1 k=3": ("opposite", Settings(1.0, top_k=3)),
}


def world(rule: Rule, case: str, kind: type[TableWorld] = TableWorld) -> TableWorld:
    draft, settings = CASES[case]
    return kind(rule, TARGET, DRAFTS[draft], settings, NUM_SAMPLES)


def p_of(run: TableWorld) -> float:
    counts = np.bincount(cells(run.run()), minlength=VOCAB_SIZE**NUM_TOKENS)
    return p_value(counts, exact_joint(TARGET, run.settings))


@pytest.mark.parametrize("rule", [rejection, block], ids=["rejection", "block"])
@pytest.mark.parametrize("case", CASES)
def test_ratio_methods(rule: Rule, case: str) -> None:
    run = world(rule, case)
    assert p_of(run) > FALSE_ALARM_RATE
    assert run.num_kept > 0.02 * run.num_drafted, "drafts should be of use, or the test proves little"


@pytest.mark.parametrize("case", ["good T=0.5", "good T=1.5 p=0.9", "bad T=1"])
def test_coupled(case: str) -> None:
    assert p_of(world(rejection, case, CoupledWorld)) > FALSE_ALARM_RATE


def test_block_keeps_more_than_rejection() -> None:
    runs = [world(rule, "good T=1") for rule in (rejection, block)]
    for run in runs:
        run.run()
    assert runs[1].num_kept / runs[1].num_drafted > runs[0].num_kept / runs[0].num_drafted
