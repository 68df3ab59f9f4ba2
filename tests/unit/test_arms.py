"""Who is decoded plainly: a share of those that leave it to us, and nobody else."""

from __future__ import annotations

import random

import pytest

from coordinator.arms import Arm, ArmLottery
from coordinator.requests import SpeculationOptions

AS_DEPLOYED = SpeculationOptions()


@pytest.mark.parametrize(("share", "arm"), [(0.0, Arm.SPECULATIVE), (1.0, Arm.PLAIN)])
def test_none_and_all(share: float, arm: Arm) -> None:
    lottery = ArmLottery(share)

    assert {lottery.draw(AS_DEPLOYED) for _ in range(1000)} == {arm}


def test_the_share_is_kept() -> None:
    lottery = ArmLottery(0.2, random.Random(1))

    num_plain = sum(lottery.draw(AS_DEPLOYED) is Arm.PLAIN for _ in range(10_000))

    assert abs(num_plain - 2000) < 200  # five standard deviations


@pytest.mark.parametrize(
    "options",
    [SpeculationOptions(disabled=True), SpeculationOptions(k=3), SpeculationOptions(policy="fixed")],
)
def test_a_request_that_says_how_takes_no_part(options: SpeculationOptions) -> None:
    assert ArmLottery(1.0).draw(options) is Arm.CHOSEN
