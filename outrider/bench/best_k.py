"""How near the policy comes to the best fixed K beside it. Pure.

Of several Ks that are equally good, whichever was lucky looks best, and what is held against it looks slower than it
is: five equal Ks whose means have a standard error of 5 % make that 5 to 6 %. So the K that a round is held against is
the one that was best in all the other rounds (leave-one-out cross-validation); how lucky it was there says nothing of
this round.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from outrider.bench.estimates import Estimate, median_of
from outrider.bench.measure import Round
from outrider.bench.systems import OUTRIDER, fixed_k

NEEDED_SHARE = 0.95
"""Of the best fixed K's tokens per second."""

_DOUBT = 2.0
"""Standard errors within which a share may be on the other side of what is needed."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What the steps of all rounds came to."""

    tokens_per_step: float
    """Of one session."""
    step_s: float
    """Seconds from one step of a session to its next."""


@dataclass(frozen=True, slots=True)
class BestK:
    """Outrider over the best fixed K of its cell."""

    name: str
    """The fixed K that was best over all rounds."""
    share: Estimate
    """Of tokens per second: geometric mean over the rounds, and their quartiles."""
    error: float | None
    """Standard error of that mean, as a share of it; None: there was one round."""
    paces: tuple[Pace, Pace] | None
    """Outrider's and that K's; None where the steps are not known."""

    @property
    def is_enough(self) -> bool:
        return self.share.value >= NEEDED_SHARE

    @property
    def may_be_enough(self) -> bool:
        """Is it, within two standard errors?"""
        return self.share.value * math.exp(_DOUBT * (self.error or 0.0)) >= NEEDED_SHARE


def best_k(rounds: Mapping[str, Sequence[Round]]) -> BestK | None:
    """Of the rounds of one block, by system; None without a fixed K."""
    mine = rounds[OUTRIDER]
    ratios = {  # logarithms, so that K is chosen by the same mean that is taken in the end
        name: [math.log(own.tokens_per_s / other.tokens_per_s) for own, other in zip(mine, its, strict=True)]
        for name, its in rounds.items()
        if fixed_k(name) is not None
    }
    if not ratios:
        return None
    everything = range(len(mine))
    found = [ratios[_best(ratios, [one for one in everything if one != left_out])][left_out] for left_out in everything]
    best = _best(ratios, everything)
    quartiles = median_of(math.exp(one) for one in found)
    share = Estimate(math.exp(statistics.mean(found)), quartiles.lower, quartiles.upper)
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    own_pace, its_pace = _pace(mine), _pace(rounds[best])
    paces = (own_pace, its_pace) if own_pace is not None and its_pace is not None else None
    return BestK(best, share, error, paces)


def _best(ratios: Mapping[str, Sequence[float]], rounds: Sequence[int]) -> str:
    """The K beside which outrider was slowest in these rounds; of a single round all that there is."""
    chosen = rounds or [0]
    return min(ratios, key=lambda name: statistics.mean(ratios[name][one] for one in chosen))


def _pace(rounds: Sequence[Round]) -> Pace | None:
    """None where nothing is known of steps."""
    num_steps = sum(one.num_steps for one in rounds)
    if not num_steps:
        return None
    num_steps_in_turn = sum(one.num_steps / len(one.runs) for one in rounds)  # sessions of a round step together
    tokens_per_step = sum(one.num_tokens for one in rounds) / num_steps
    return Pace(tokens_per_step, sum(one.decode_s for one in rounds) / num_steps_in_turn)
