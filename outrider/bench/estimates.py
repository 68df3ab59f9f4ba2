"""A measured number and its spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, usually a median, and the quartiles of what it was taken from."""

    value: float
    lower: float
    upper: float

    @property
    def spread(self) -> tuple[float, float]:
        return self.lower, self.upper

    def inverse(self) -> Estimate:
        """Of 1 / x, the quartiles changing places."""
        return Estimate(1 / self.value, 1 / self.upper, 1 / self.lower)


def median_of(values: Iterable[float]) -> Estimate:
    """Median and quartiles of at least one value."""
    found = list(values)
    if len(found) == 1:
        return Estimate(found[0], found[0], found[0])
    lower, middle, upper = statistics.quantiles(found, n=4, method="inclusive")
    return Estimate(middle, lower, upper)
