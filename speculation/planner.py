"""Which drafted tokens go into a verify step, and whether to wait for more before running it.

Both questions are asked in one currency: committed tokens per second of the whole step, over all its sessions.

**Trimming.** With ``n`` drafted tokens in the step the best choice is the ``n`` most likely to be reached and accepted
(survival never rises with depth, so that is a prefix of each session's chain), whatever a step costs. So the best plan
is the best ``n``: the maximum of ``E(n) / V(B + n)`` over the prefixes of one sorted list. No marginal rule with
a first stop is needed, and steps in the cost curve (padded batch shapes) are no trap.

**Waiting.** Running now is not lost time for the drafter: it goes on drafting during the step, and what is on its way
stays usable if the target's own token agrees with its first one. So options are compared over two steps::

    run now     (E_now  + E_next) / (V_now  + V_next)
    wait for w  (E_wait + E_next) / (w + V_wait + V_next)

for each ``w`` at which some session's n-th further draft is expected. ``E_next`` counts the drafts that will have
arrived by then, if the step just before leaves them usable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from speculation.cost import DraftPace, StepCostModel, StepCurve
from speculation.messages import SessionId

WAIT_MARGIN = 0.03
"""Waiting must promise so much more: the two-step comparison is a model, running now a certainty."""

WAIT_CAP_STEPS = 1.0
"""At most so many plain steps are waited in a row: a drafter that breaks its promise halves the speed of one step."""

MAX_WAITING_SESSIONS = 4
"""With more sessions in the step just run: one's wait is everyone's, and drafts for some are nearly always there."""

MIN_WAIT_S = 1e-4
"""Shortest wait asked for; a timer is no finer."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One session that could be in the next step."""

    session_id: SessionId
    num_staged: int
    """Usable staged tokens, already capped by the end of the sequence."""
    k: int
    """Cap from the coordinator; 0 is plain decoding."""
    survival: tuple[float, ...]
    """P(the first d drafted tokens are accepted) for d = 1 .. k, never rising; more is fine."""
    pace: DraftPace | None
    """None: no drafter feeds this session."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to do next."""

    wait_s: float
    """0: run now. Otherwise wait at most so long for proposals, then plan again."""
    num_drafted: Mapping[SessionId, int]
    """Drafted tokens to verify, for each candidate; every candidate is in the step."""


@dataclass(frozen=True, slots=True)
class _Feed:
    """A candidate as the waiting rule sees it: what is staged and what is expected to arrive."""

    num_staged: int
    best_k: int  # drafts that a step would take if there were enough, K at most
    survival: tuple[float, ...]
    gains: Sequence[float]  # expected accepted tokens of 0, 1, 2, ... drafts
    first_s: float  # seconds until the next draft arrives; inf: none will
    token_s: float  # seconds per further draft

    def num_at(self, after_s: float) -> int:
        """Drafts there ``after_s`` from now, used ones included; no more than two steps can use."""
        if after_s < self.first_s:
            return self.num_staged
        num_arrived = 1 + int((after_s - self.first_s) / max(self.token_s, 1e-9) + 1e-6)
        return max(self.num_staged, min(self.num_staged + num_arrived, 2 * self.best_k + 1))


class StepPlanner:
    """Plans one target's steps. Holds no session state: ask again whenever something changed."""

    def __init__(
        self,
        costs: StepCostModel,
        max_step_tokens: int,
        wait_margin: float = WAIT_MARGIN,
        wait_cap_steps: float = WAIT_CAP_STEPS,
    ) -> None:
        """``max_step_tokens``: tokens of a step, prefill included. ``wait_cap_steps`` 0: never wait."""
        self._costs = costs
        self._max_step_tokens = max_step_tokens
        self._wait_margin = wait_margin
        self._wait_cap_steps = wait_cap_steps

    def plan(
        self, candidates: Sequence[Candidate], now_s: float, waited_s: float, num_prefill_tokens: int = 0
    ) -> StepPlan:
        """The next step for ``candidates``, after ``waited_s`` of waiting for it already.

        ``num_prefill_tokens`` are in the step whatever is decided here; with any there is work, so no waiting.
        """
        num_fixed = len(candidates) + num_prefill_tokens
        curve = self._costs.curve(num_fixed, len(candidates)) if candidates else None
        chances = _chances(candidates, self._max_step_tokens - num_fixed)
        wait_s = 0.0
        if curve is not None:
            chances = chances[: _best_count(chances, len(candidates), num_fixed, curve)]
            if not num_prefill_tokens and len(candidates) <= MAX_WAITING_SESSIONS and self._wait_cap_steps:
                wait_s = self._wait_s(candidates, now_s, waited_s, curve)
        num_drafted = {candidate.session_id: 0 for candidate in candidates}
        for _, index in chances:
            num_drafted[candidates[index].session_id] += 1
        return StepPlan(wait_s, num_drafted)

    def _wait_s(self, candidates: Sequence[Candidate], now_s: float, waited_s: float, curve: StepCurve) -> float:
        if all(c.num_staged >= min(c.k, len(c.survival)) for c in candidates):
            return 0.0
        feeds = self._feeds(candidates, now_s, curve)
        if feeds is None:
            return 0.0
        longest_s = self._wait_cap_steps * curve.at(len(candidates)) - waited_s
        best_s, best_rate = 0.0, (1.0 + self._wait_margin) * _two_step_rate(feeds, 0.0, curve)
        for wait_s in _waits_s(feeds, longest_s):
            rate = _two_step_rate(feeds, wait_s, curve)
            if rate > best_rate:
                best_s, best_rate = max(wait_s, MIN_WAIT_S), rate
        return best_s

    def _feeds(self, candidates: Sequence[Candidate], now_s: float, curve: StepCurve) -> list[_Feed] | None:
        """None when there is nothing to wait for, or a session's pace is unknown or overdue."""
        full = _chances(candidates, self._max_step_tokens - len(candidates), staged_only=False)
        best_k = [0] * len(candidates)
        for _, index in full[: _best_count(full, len(candidates), len(candidates), curve)]:
            best_k[index] += 1
        feeds = []
        for candidate, cap in zip(candidates, best_k, strict=True):
            first_s, token_s = math.inf, 1.0
            if candidate.pace is not None and candidate.num_staged < cap:
                expected_s = candidate.pace.expected_wait_s(1, now_s)
                if expected_s is None or candidate.pace.token_s is None:
                    return None
                first_s, token_s = expected_s, candidate.pace.token_s
            feeds.append(
                _Feed(candidate.num_staged, cap, candidate.survival, _gains(candidate.survival), first_s, token_s)
            )
        return feeds


def _waits_s(feeds: Sequence[_Feed], longest_s: float) -> list[float]:
    """Times at which some session's 1st, 2nd, 4th, 8th ... or last useful draft is expected, ``longest_s`` at most.

    Not every n: each arrival is planned anew anyway.
    """
    waits_s = []
    for feed in feeds:
        room, count = feed.best_k - feed.num_staged, 1
        while room > 0:
            wait_s = feed.first_s + (min(count, room) - 1) * feed.token_s
            if wait_s > longest_s:
                break
            waits_s.append(wait_s)
            if count >= room:
                break
            count *= 2
    return waits_s


def _chances(candidates: Sequence[Candidate], max_drafted: int, staged_only: bool = True) -> list[tuple[float, int]]:
    """``(survival, candidate index)`` of the drafted tokens that may enter the step, most likely first.

    ``staged_only`` False: as if everything up to K were staged.
    """
    chances = [
        (chance, index)
        for index, candidate in enumerate(candidates)
        for chance in candidate.survival[: min(candidate.k, candidate.num_staged) if staged_only else candidate.k]
    ]
    if len(candidates) > 1:
        chances.sort(reverse=True)
    return chances[: max(0, max_drafted)]


def _best_count(chances: Sequence[tuple[float, int]], num_sessions: int, num_fixed: int, curve: StepCurve) -> int:
    """How many of ``chances`` to take for the most committed tokens per second; of equals the fewest."""
    expected = float(num_sessions)
    best, best_rate = 0, expected / curve.at(num_fixed)
    for count, (chance, _) in enumerate(chances, start=1):
        expected += chance
        rate = expected / curve.at(num_fixed + count)
        if rate > best_rate:
            best, best_rate = count, rate
    return best


def _gains(survival: Sequence[float]) -> list[float]:
    """Expected accepted tokens of 0, 1, 2, ... drafted ones."""
    return [0.0, *accumulate(survival)]


def _agrees(survival: Sequence[float], depth: int) -> float:
    """P(the first ``depth`` drafts are accepted and the target's own token is the next draft)."""
    if depth < len(survival):
        return survival[depth]
    return survival[-1] * (survival[-1] / survival[-2] if len(survival) > 1 and survival[-2] else survival[-1])


def _two_step_rate(feeds: Sequence[_Feed], wait_s: float, curve: StepCurve) -> float:
    """Committed tokens per second of waiting, the step after it and the step after that.

    A session's second step has drafts if the first one accepted all of its own and the target's own token agrees with
    the draft that follows; after a miss it is a plain one.
    """
    drafted = [min(feed.num_at(wait_s), feed.best_k) for feed in feeds]
    step_s = curve.at(len(feeds) + sum(drafted))
    num_tokens, num_rows = 2.0 * len(feeds), float(len(feeds))
    for feed, depth in zip(feeds, drafted, strict=True):
        num_tokens += feed.gains[depth]
        num_next = min(feed.num_at(wait_s + step_s) - depth - 1, feed.best_k)
        if num_next > 0:
            usable = _agrees(feed.survival, depth)
            num_tokens += usable * feed.gains[num_next]
            num_rows += usable * num_next
    return num_tokens / (wait_s + step_s + curve.at(num_rows))
