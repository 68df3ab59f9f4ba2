"""How likely drafted tokens are to be accepted, by depth, learned from verify steps.

A verify step that drafted ``n`` tokens and accepted ``a`` of them is one trial at each of the depths ``1 .. a + 1``
(depth ``d`` is tried only when all before it were accepted), but only as far as ``n``: a step that accepted everything
says nothing about depth ``n + 1``. Counting it as a failure there would make every K look as if it were the right one.

Estimates are ratios of exponentially weighted counts. A depth leans on the depth before it, the first on all depths
together, each with the weight of a few trials; so a profile is usable after a handful of steps and a depth that is
rarely reached is no wilder than its neighbours.
"""

from __future__ import annotations

START_RATE = 0.7
"""Conditional acceptance before anything is known: what a distilled draft reaches (0.61 to 0.77 on the first
demo pairs)."""

START_WEIGHT = 1.0
"""Trials that `START_RATE` counts for: little, so that one bad step is believed more than the guess."""

NEIGHBOUR_WEIGHT = 4.0
"""Trials that the neighbouring depth counts for. Acceptance changes by a few points per depth at most, the spread of
four trials is 20 points: below four trials the neighbour knows better."""

PRIOR_WEIGHT = 8.0
"""Steps that a prior may count for in a new profile: enough to start at the right K, little enough for a session that
is unlike the others to find its own within ten steps."""

SESSION_WINDOW_STEPS = 64.0
"""Steps (with drafted tokens) behind a session's estimate: its rate is known to about five points, and a change of
topic shows within a paragraph."""

DEPLOYMENT_WINDOW_STEPS = 2048.0
"""The same for a profile that many sessions feed."""


class AcceptanceProfile:
    """Conditional acceptance per depth: P(depth d accepted | depths < d accepted), as an EMA over steps."""

    def __init__(
        self,
        prior: AcceptanceProfile | None = None,
        *,
        window_steps: float = SESSION_WINDOW_STEPS,
        prior_weight: float = PRIOR_WEIGHT,
    ) -> None:
        """Starts from a copy of ``prior``, of which at most ``prior_weight`` steps count.

        ``window_steps`` is the sum of the weights of an endless history, in steps.
        """
        self._decay = 1.0 - 1.0 / window_steps
        self._num_tried: list[float] = []  # by depth - 1, exponentially weighted
        self._num_passed: list[float] = []
        self._survival: tuple[float, ...] = ()  # cache; empty after a change
        self._start_rate = START_RATE
        if prior is not None:
            self._num_tried, self._num_passed = list(prior._num_tried), list(prior._num_passed)
            self._start_rate = prior._start_rate
            self.limit_weight(prior_weight)

    @property
    def weight(self) -> float:
        """Steps behind the estimate, exponentially weighted; 0 when nothing was observed."""
        return self._num_tried[0] if self._num_tried else 0.0

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """One verify step. Without drafted tokens it says nothing and is ignored."""
        if num_drafted <= 0:
            return
        num_tried = min(num_accepted + 1, num_drafted)
        self._num_tried.extend([0.0] * (num_tried - len(self._num_tried)))
        self._num_passed.extend([0.0] * (num_tried - len(self._num_passed)))
        self._scale(self._decay)
        for index in range(num_tried):
            self._num_tried[index] += 1.0
            self._num_passed[index] += index < num_accepted

    def limit_weight(self, max_steps: float) -> None:
        """Forgets confidence, not the estimate: what was seen counts for at most ``max_steps`` steps from now on."""
        if self.weight > max_steps:
            self._start_rate = self._pooled_rate()  # or the guess would gain what the rest loses
            self._scale(max_steps / self.weight)

    def _scale(self, factor: float) -> None:
        self._num_tried = [count * factor for count in self._num_tried]
        self._num_passed = [count * factor for count in self._num_passed]
        self._survival = ()

    def survival(self, max_depth: int) -> tuple[float, ...]:
        """P(the first d drafted tokens are all accepted) for d = 1 .. ``max_depth``; never rising."""
        if len(self._survival) < max_depth:
            self._survival = self._chain(max_depth)
        return self._survival[:max_depth]

    def _pooled_rate(self) -> float:
        return (sum(self._num_passed) + START_WEIGHT * self._start_rate) / (sum(self._num_tried) + START_WEIGHT)

    def _chain(self, max_depth: int) -> tuple[float, ...]:
        rate, survival, survivals = self._pooled_rate(), 1.0, []
        for num_tried, num_passed in zip(self._num_tried[:max_depth], self._num_passed, strict=False):
            rate = (num_passed + NEIGHBOUR_WEIGHT * rate) / (num_tried + NEIGHBOUR_WEIGHT)
            if rate > 1.0:  # rounding
                rate = 1.0
            survival *= rate
            survivals.append(survival)
        for _ in range(len(survivals), max_depth):
            survival *= rate
            survivals.append(survival)
        return tuple(survivals)

    def expected_tokens(self, k: int) -> float:
        """Tokens that a step with ``k`` drafted ones commits on average, the target's own included.

        ``1 + sum(survival(k))``; with one rate for all depths this is Leviathan's (1 - a^(k+1)) / (1 - a)
        (arXiv 2211.17192, eq. 1).
        """
        return 1.0 + sum(self.survival(k))
