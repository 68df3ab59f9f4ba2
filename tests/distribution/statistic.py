"""How far counts are from what they should be."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

NUM_SAMPLES = 200_000

FALSE_ALARM_RATE = 1e-6
"""Of one test. With fixed seeds a test passes always or never; had the seeds been chosen anew, correct code would fail
one of some fifty tests in twenty thousand choices."""


def p_value(counts: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> float:
    """Chi-square over the cells; 0 if something impossible happened.

    Cells with fewer than 5 expected counts are taken together, and left out if that does not make 5.
    """
    if counts[probabilities == 0].any():
        return 0.0
    expected = counts.sum() * probabilities
    is_rare = expected < 5
    seen, hoped = counts[~is_rare].astype(float), expected[~is_rare]
    if expected[is_rare].sum() >= 5:
        seen, hoped = np.append(seen, counts[is_rare].sum()), np.append(hoped, expected[is_rare].sum())
    distance = float(((seen - hoped) ** 2 / hoped).sum())
    return float(stats.chi2.sf(distance, len(seen) - 1))
