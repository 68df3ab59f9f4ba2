"""How many drafted tokens to verify per step: the coordinator's policies, one object per session.

A policy is fed the session's verdicts and answers with K at any time. Three are there: `FixedK`, `ThresholdK` (the rule
most engines know: more while nearly all is accepted, less while much is not) and `GoodputK`, the default, which asks
what counts: with which K does the target commit most tokens per second under its present load? Acceptance alone is the
wrong signal: at a constant 0.9 the right answer goes from +23 % to -16 % as the batch grows (vLLM issue #26504).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol

from speculation.acceptance import AcceptanceProfile
from speculation.cost import StepCostModel
from speculation.messages import Verdict
from speculation.pace_check import CheckedK, PaceCheck

START_K = 4
"""K while nothing is known: within a fifth of the best K's goodput for acceptance 0.5 to 0.9 when a step with five
tokens costs up to 1.3 plain ones."""

THRESHOLD_WINDOW_STEPS = 10
THRESHOLD_RAISE_ABOVE = 0.85
THRESHOLD_LOWER_BELOW = 0.60
THRESHOLD_MIN_K = 2
THRESHOLD_MAX_K = 8
"""The published rule's numbers."""

ACCEPTED_STEPS = 32
"""Recent steps with drafted tokens that say how many the target may accept."""

HEADROOM = 4
"""Drafted tokens that K is above that: a chain that is surer than all of those is not cut, and K grows fast."""

SPECULATION_GAIN = 0.03
"""What K > 0 must promise over K = 0 to go on: K = 0 also saves the drafter's work, which no verdict shows."""

RESUME_GAIN = 0.06
"""What K > 0 must promise to begin again after K = 0: twice as much, so that the border is not crossed to and fro."""

MIN_EVIDENCE_STEPS = 6.0
"""Steps with drafted tokens below which K falls to 1 and not to 0: after so few a drafter that is right half of the
time looks useless now and then, and coming back from 0 takes a probe."""

PROBE_K = 2
"""Drafted tokens per step of a probe: two depths show whether deeper ones are worth it, at little cost."""

PROBE_STEPS = 4
"""Steps with drafted tokens that decide a probe: at acceptance 0.7 one in 120 probes sees none accepted."""

PROBE_PATIENCE_STEPS = 16
"""Steps without drafted tokens after which a probe gives up. They are plain steps; the drafter is catching up."""

PROBE_WEIGHT_STEPS = 2.0
"""What was known before a probe counts for so many steps in it: half of what the probe sees."""

PROBE_COST = 0.01
"""Share of the time at K = 0 that probes may take. With the first steps of a session it stays below 2 %."""

MIN_PROBE_EVERY, MAX_PROBE_EVERY = 64, 1024
"""Committed tokens at K = 0 before a probe, doubled after each that failed. The upper end is how late a drafter that
has become good is noticed: some ten seconds of text."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the session's target has to do."""

    num_sessions: int
    """Sessions running there now, this one included."""


class KPolicy(Protocol):
    """Chooses K for one session."""

    @property
    def name(self) -> str:
        """As in `POLICY_NAMES`."""
        ...

    def observe(self, verdict: Verdict, load: Load, now_s: float) -> None:
        """One verify step of the session. Steps without drafted tokens say nothing about acceptance."""
        ...

    def k(self) -> int:
        """Cap on drafted tokens per step from now on. 0: no drafting at all."""
        ...


class FixedK:
    """Always the same K."""

    name: Final = "fixed"

    def __init__(self, k: int) -> None:
        self._k = k

    def observe(self, verdict: Verdict, load: Load, now_s: float) -> None:
        """Nothing to learn."""

    def k(self) -> int:
        return self._k


class ThresholdK:
    """K + 1 above 0.85 accepted over the last 10 steps with drafted tokens, K - 1 below 0.60, within [2, 8].

    The rule is asked at every such step once ten are in the window; a move empties the window, for what was seen under
    another K does not speak for this one.
    """

    name: Final = "threshold"

    def __init__(self, max_k: int, k: int = START_K) -> None:
        self._max_k = min(max_k, THRESHOLD_MAX_K)
        self._min_k = min(THRESHOLD_MIN_K, self._max_k)
        self._k = self._clamped(k)
        self._window: deque[tuple[int, int]] = deque(maxlen=THRESHOLD_WINDOW_STEPS)  # drafted, accepted

    def observe(self, verdict: Verdict, load: Load, now_s: float) -> None:
        if not verdict.num_drafted:
            return
        self._window.append((verdict.num_drafted, verdict.num_accepted))
        if len(self._window) == THRESHOLD_WINDOW_STEPS:
            self._move()

    def _move(self) -> None:
        rate = sum(accepted for _, accepted in self._window) / sum(drafted for drafted, _ in self._window)
        wanted = self._clamped(self._k + (rate > THRESHOLD_RAISE_ABOVE) - (rate < THRESHOLD_LOWER_BELOW))
        if wanted != self._k:
            self._k = wanted
            self._window.clear()

    def _clamped(self, k: int) -> int:
        return max(self._min_k, min(k, self._max_k))

    def k(self) -> int:
        return self._k


class GoodputK:
    """The K with the highest expected committed tokens per second under the present load.

    With B sessions alike on the target that is the maximum over k of ``B E(k) / V(B (k + 1), B)``: E the expected
    tokens of a step (`AcceptanceProfile`), V its seconds (`StepCostModel`). Where speculation does not pay K is 0, and
    the drafter idle. From there short probes look whether it pays by now, ever more rarely while it does not.

    Where it pays that is the least that K is. The target knows more: how sure the drafter was of the very tokens that
    are staged, and for which of its sessions a row is worth most. So K keeps out of its way and is some tokens, the
    ``headroom``, above the most that it has accepted of one step lately.
    """

    name: Final = "goodput"

    def __init__(
        self, max_k: int, costs: StepCostModel, prior: AcceptanceProfile, k: int = START_K, headroom: int = HEADROOM
    ) -> None:
        """``prior`` is the deployment's profile: the session starts from it and reports to it.

        ``headroom`` 0: none, where K is not a cap and what is drafted for it is waited for.
        """
        self._max_k = max_k
        self._costs = costs
        self._prior = prior
        self._profile = AcceptanceProfile(prior)
        self._num_sessions = 1
        self._probing = False
        self._num_probe_drafted = 0  # steps of this probe with drafted tokens
        self._num_probe_empty = 0  # and without
        self._num_idle_tokens = 0  # committed at K = 0 since the last probe
        self._num_failed_probes = 0
        self._headroom = headroom
        self._num_accepted: deque[int] = deque(maxlen=ACCEPTED_STEPS)
        self._k = min(k, max_k)
        self._k = self._best_k()

    @property
    def profile(self) -> AcceptanceProfile:
        """What the session has learned."""
        return self._profile

    def k(self) -> int:
        return min(PROBE_K, self._max_k) if self._probing else self._k

    def observe(self, verdict: Verdict, load: Load, now_s: float) -> None:
        was_with, self._num_sessions = self._num_sessions, max(1, load.num_sessions)
        for num_drafted, num_right in self._evidence(verdict):
            self._profile.observe(num_drafted, num_right)
            self._prior.observe(num_drafted, num_right)
        if verdict.num_drafted:
            self._num_accepted.append(verdict.num_accepted)
        if self._probing:
            self._on_probe_step(verdict)
        elif self._k == 0:
            self._on_idle_step(verdict)
        elif verdict.num_drafted or verdict.num_late or self._num_sessions != was_with:
            self._k = self._best_k()

    @staticmethod
    def _evidence(verdict: Verdict) -> tuple[tuple[int, int], tuple[int, int]]:
        """Verified chains, and those that were decided before they could be: being late is no proof of being right."""
        num_late = min(verdict.num_late, verdict.num_late_right + 1)
        return (verdict.num_drafted, verdict.num_accepted), (num_late, verdict.num_late_right)

    def _on_idle_step(self, verdict: Verdict) -> None:
        self._k = self._best_k()  # the load may have changed
        self._num_idle_tokens += len(verdict.token_ids)
        if self._k == 0 and self._max_k > 0 and self._num_idle_tokens >= self._probe_every():
            self._probing, self._num_probe_drafted, self._num_probe_empty = True, 0, 0
            self._profile.limit_weight(PROBE_WEIGHT_STEPS)

    def _on_probe_step(self, verdict: Verdict) -> None:
        if verdict.num_drafted or verdict.num_late:
            self._num_probe_drafted += 1
        else:
            self._num_probe_empty += 1
        if self._num_probe_drafted < PROBE_STEPS and self._num_probe_empty < PROBE_PATIENCE_STEPS:
            return
        self._probing, self._num_idle_tokens = False, 0
        if self._num_probe_drafted:
            self._k = self._best_k()
        self._num_failed_probes = 0 if self._k else self._num_failed_probes + 1

    def _probe_every(self) -> int:
        """Committed tokens at K = 0 before the next probe: as many as keep its cost below `PROBE_COST`."""
        size = self._num_sessions
        plain_s = self._costs.step_s(size, size)
        probe_s = self._costs.step_s(size * (1 + min(PROBE_K, self._max_k)), size)
        affordable = PROBE_STEPS * (probe_s / plain_s - 1.0) / PROBE_COST if plain_s and probe_s else 0.0
        return int(min(MAX_PROBE_EVERY, max(affordable, MIN_PROBE_EVERY) * 2.0 ** min(self._num_failed_probes, 16)))

    def _best_k(self) -> int:
        rates = self._rates()
        if rates is None:
            return self._k
        best = max(range(len(rates)), key=rates.__getitem__)
        gain = SPECULATION_GAIN if self._k else RESUME_GAIN
        if rates[best] < (1.0 + gain) * rates[0]:
            return int(self._k > 0 and self._profile.weight < MIN_EVIDENCE_STEPS)
        if not self._headroom:
            return best
        return min(self._max_k, max(best, max(self._num_accepted, default=0) + self._headroom))

    def _rates(self) -> list[float] | None:
        """Expected committed tokens per second and session for K = 0 .. max_k; None while costs are unknown."""
        size = self._num_sessions
        curve = self._costs.curve(size, size)
        if curve is None:
            return None
        expected, rates = 1.0, [1.0 / curve.at(size)]
        for k, chance in enumerate(self._profile.survival(self._max_k), start=1):
            expected += chance
            rates.append(expected / curve.at(size * (k + 1)))
        return rates


POLICY_NAMES = (FixedK.name, ThresholdK.name, GoodputK.name)


def make_policy(
    name: str,
    *,
    max_k: int,
    k: int | None,
    costs: StepCostModel,
    prior: AcceptanceProfile,
    check: PaceCheck,
    turns: bool = False,
) -> KPolicy:
    """The policy called ``name`` for one session, which takes ``turns`` or not: then it waits for K drafts.

    ``k`` is where it starts, and for ``fixed`` stays (None: 4); ``max_k`` caps it. ``costs`` are the target's,
    ``prior`` is the deployment's profile and ``check`` its comparisons with plain decoding; ``goodput`` uses and feeds
    them. Raises ValueError on an unknown name or a negative count.
    """
    if max_k < 0 or (k is not None and k < 0):
        raise ValueError(f"k and max_k must be 0 or more, not k = {k}, max_k = {max_k}")
    start = min(max_k, START_K if k is None else k)
    if name == FixedK.name:
        return FixedK(start)
    if name == ThresholdK.name:
        return ThresholdK(max_k, start)
    if name == GoodputK.name:
        return CheckedK(GoodputK(max_k, costs, prior, start, headroom=0 if turns else HEADROOM), check)
    raise ValueError(f"unknown K policy {name!r}; choose one of: {', '.join(POLICY_NAMES)}")
