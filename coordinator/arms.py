"""Two arms of one experiment in production: a share of the requests is decoded plainly, so that what speculation
gives is measured on the same traffic at the same time, not remembered from a benchmark.

Only requests that leave speculation to the deployment take part: one that asked for something gets it. What an arm was
drawn for it keeps, whether or not a drafter was there in the end (intention to treat), so that outages count.
"""

from __future__ import annotations

import enum
import random

from coordinator.requests import SpeculationOptions

PLAIN_DECODING = SpeculationOptions(disabled=True)


class Arm(enum.Enum):
    """The values of the label ``arm``."""

    SPECULATIVE = "speculative"
    """As deployed."""
    PLAIN = "plain"
    """Decoded plainly: by lot, or because nothing else is possible here."""
    CHOSEN = "chosen"
    """The request said itself how to speculate, or not to; it belongs in no comparison."""


class ArmLottery:
    """Assigns requests to arms."""

    def __init__(self, plain_share: float, rng: random.Random | None = None) -> None:
        """``plain_share`` in [0, 1] of the requests that take part are decoded plainly."""
        self._plain_share = plain_share
        self._rng = rng or random.Random()

    def draw(self, options: SpeculationOptions) -> Arm:
        """The arm of a request that asks for ``options``."""
        if options != SpeculationOptions():
            return Arm.CHOSEN
        return Arm.PLAIN if self._rng.random() < self._plain_share else Arm.SPECULATIVE
