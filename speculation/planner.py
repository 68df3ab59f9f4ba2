"""Which drafted tokens go into a verify step, and whether to wait for more before running it.

Both questions are asked in one currency: committed tokens per second of the whole step, over all its sessions.

**Trimming.** With ``n`` drafted tokens in the step the best choice is the ``n`` most likely to be reached and accepted
(survival never rises with depth, so that is a prefix of each session's chain), whatever a step costs. So the best plan
is the best ``n``: the maximum of ``E(n) / V(B + n)`` over the prefixes of one sorted list. No marginal rule with
a first stop is needed, and steps in the cost curve (padded batch shapes) are no trap.

**Waiting.** Running now is not lost time for the drafter: it goes on drafting during the step, and what is on its way
stays usable if the target's own token agrees with its first one. But neither is a step with few drafts free: after the
next miss everything starts again. So a session is seen as cycles from miss to miss (a renewal process)::

    miss --wait for n drafts, or a plain step--> step --all accepted, own token agrees--> full step --+--> miss
                                                  |                                      ^------------+
                                                  +--else--> miss

which gives ``rate``, the committed tokens per second of the best way to run it, and ``streak``, the tokens that a
running streak is worth over a miss. Running after waiting for ``w`` (0: now) is then worth ``E + P(goes on) * streak -
rate * (w + V)``: what the step commits, what it leaves behind, less what its time would otherwise yield. Over 135
settings of the event simulation in the tests this came within 4 % of the best fixed rule (always run, or always wait
for n); comparing tokens per second over two steps lost up to 13 %, as it takes what follows the next miss for plain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from speculation.cost import StepCostModel, StepCurve
from speculation.messages import SessionId
from speculation.pace import DraftPace
from speculation.turns import Turn

WAIT_MARGIN = 0.03
"""Waiting must promise so much more, as a share of the tokens of a plain step's time: the drafts are a forecast,
running now is a certainty."""

WAIT_CAP_STEPS = 1.0
"""At most so many plain steps are waited in a row: a drafter that breaks its promise halves the speed of one step."""

MAX_WAITING_SESSIONS = 1
"""With more sessions in the step just run: one's wait is everyone's. Simulated with two and four, waiting brought
nothing; and without it drafts may gather until the step is over."""

OVERDUE = 1.5
"""Times the expected time of the first arrival after which to look again: arrivals end a wait early, and so should
silence."""

MAX_GOING_ON = 0.99
"""A streak is believed to last a hundred steps at most; keeps its worth finite."""

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
    """P(the first d drafted tokens are accepted) for d = 1 .. k as a rule, never rising; more is fine."""
    pace: DraftPace | None
    """None: no drafter feeds this session."""
    turn: Turn | None = None
    """Set for a session that takes turns with its drafter; it sits out until its turn comes."""
    looked_up: tuple[float, ...] = ()
    """P(the first d of the tokens looked up behind the staged ones are right, if those are) for d = 1, 2, ..."""
    survival_now: tuple[float, ...] | None = None
    """``survival`` of the very tokens that are staged and of what may come behind them; None: no more is known."""

    @property
    def now(self) -> tuple[float, ...]:
        """P(the first d drafted tokens of the next step are accepted) for d = 1 .. k."""
        return self.survival if self.survival_now is None else self.survival_now

    @property
    def chances(self) -> tuple[float, ...]:
        """P(the first d of all tokens that may enter are accepted) for d = 1, 2, ...; never rising."""
        staged = self.now[: min(self.k, self.num_staged)]
        reached = staged[-1] if staged else 1.0
        return (*staged, *[reached * chance for chance in self.looked_up])


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to do next."""

    wait_s: float
    """0: run now. Otherwise wait at most so long for proposals, then plan again."""
    num_drafted: Mapping[SessionId, int]
    """Drafted tokens to verify, for each candidate that is in the step: all but those that wait for their turn."""


class _Odds:
    """Of a session's drafts."""

    def __init__(self, survival: Sequence[float]) -> None:
        self._survival = survival
        self.gains: Sequence[float] = [0.0, *accumulate(survival)]
        """Expected accepted tokens of 0, 1, 2, ... drafts."""

    def reaches(self, depth: int) -> float:
        """P(the first ``depth`` drafts are accepted)."""
        return self._survival[depth - 1] if depth else 1.0

    def agrees(self, depth: int) -> float:
        """P(the first ``depth`` drafts are accepted and the target's own token is the next draft)."""
        survival = self._survival
        if depth < len(survival):
            return survival[depth]
        if not survival:
            return 0.0
        return survival[-1] * (survival[-1] / survival[-2] if len(survival) > 1 and survival[-2] else survival[-1])

    def __len__(self) -> int:
        return len(self._survival)


@dataclass(frozen=True, slots=True)
class _Cycle:
    """The long run of one session among ``num_sessions`` alike; see the top of the file."""

    rate: float  # committed tokens per second
    streak: float  # tokens that a full step going on is worth over a miss


@dataclass(frozen=True, slots=True)
class _FreeRun:
    """A step without drafts, of one session."""

    num_tokens: float  # that it commits
    step_s: float

    @property
    def rate(self) -> float:
        return self.num_tokens / self.step_s


@dataclass(frozen=True, slots=True)
class _Feed:
    """A candidate as the waiting rule sees it: what is staged and what is expected to arrive."""

    num_staged: int
    best_k: int  # drafts that a step would take if there were enough, K at most
    now: _Odds  # of the next step's drafts
    usual: _Odds  # of later ones
    first_s: float  # seconds until the next draft arrives; inf: none will
    token_s: float  # seconds per further draft
    cycle: _Cycle
    looked_up: tuple[float, ...]  # chances of what fills a step behind the drafts

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
        self,
        candidates: Sequence[Candidate],
        now_s: float,
        waited_s: float,
        num_prefill_tokens: int = 0,
        may_wait: bool = True,
    ) -> StepPlan:
        """The next step for ``candidates``, after ``waited_s`` of waiting for it already; ``may_wait``: for drafts.

        ``num_prefill_tokens`` are in the step whatever is decided here; with any there is work, so no waiting.
        """
        turn_wait_s = 0.0 if num_prefill_tokens else _turn_wait_s(candidates, now_s)
        if turn_wait_s:
            candidates = [one for one in candidates if one.turn is None]
            if not candidates:
                return StepPlan(turn_wait_s, {})
        num_fixed = len(candidates) + num_prefill_tokens
        curve = self._costs.curve(num_fixed, len(candidates)) if candidates else None
        chances = _chances(candidates, self._max_step_tokens - num_fixed)
        wait_s = 0.0
        if curve is not None:
            chances = chances[: _best_count(chances, len(candidates), num_fixed, curve)]
            if may_wait and not num_prefill_tokens and len(candidates) <= MAX_WAITING_SESSIONS and self._wait_cap_steps:
                wait_s = self._wait_s(candidates, now_s, waited_s, curve)
        num_drafted = {candidate.session_id: 0 for candidate in candidates}
        for _, index in chances:
            num_drafted[candidates[index].session_id] += 1
        return StepPlan(wait_s, num_drafted)

    def _wait_s(self, candidates: Sequence[Candidate], now_s: float, waited_s: float, curve: StepCurve) -> float:
        longest_s = self._wait_cap_steps * curve.at(len(candidates)) - waited_s
        if not any(_may_wait(one, now_s, longest_s) for one in candidates):
            return 0.0
        feeds = self._feeds(candidates, now_s, curve)
        if feeds is None:
            return 0.0
        margin = self._wait_margin * curve.at(len(candidates)) * sum(feed.cycle.rate for feed in feeds)
        best_s, best_value = 0.0, _value(feeds, 0.0, curve) + margin
        for wait_s in _waits_s(feeds, longest_s):
            value = _value(feeds, wait_s, curve)
            if value > best_value:
                best_s, best_value = wait_s, value
        soonest_s = min(feed.first_s for feed in feeds)
        return max(MIN_WAIT_S, min(best_s, OVERDUE * soonest_s)) if best_s else 0.0

    def _feeds(self, candidates: Sequence[Candidate], now_s: float, curve: StepCurve) -> list[_Feed] | None:
        """None when there is nothing to wait for, or a session's pace is unknown or overdue."""
        num_sessions = len(candidates)
        full = _chances(candidates, self._max_step_tokens - num_sessions, staged_only=False)
        best_k = [0] * num_sessions
        for _, index in full[: _best_count(full, num_sessions, num_sessions, curve)]:
            best_k[index] += 1
        if all(one.num_staged >= cap for one, cap in zip(candidates, best_k, strict=True)):
            return None
        feeds = []
        for one, cap in zip(candidates, best_k, strict=True):
            feed = _feed(one, cap, num_sessions, now_s, curve)
            if feed is None:
                return None
            feeds.append(feed)
        return feeds


def _turn_wait_s(candidates: Sequence[Candidate], now_s: float) -> float:
    """How long those that take turns sit out at most; they go together. 0: they are ready."""
    return max((one.turn.wait_s(one.num_staged, now_s) for one in candidates if one.turn is not None), default=0.0)


def _may_wait(one: Candidate, now_s: float, longest_s: float) -> bool:
    """Could a draft arrive in time that this session has use for? The cheap half of the question."""
    if one.pace is None or longest_s <= 0.0 or one.num_staged >= min(one.k, len(one.survival)):
        return False
    first_s = one.pace.expected_wait_s(1, now_s)
    return first_s is not None and first_s <= longest_s


def _feed(one: Candidate, best_k: int, num_sessions: int, now_s: float, curve: StepCurve) -> _Feed | None:
    """None if drafts are wanted and it is not known when they will be here."""
    now, usual = _Odds(one.now), _Odds(one.survival)
    free = _free_run(one.looked_up, num_sessions, curve)
    plain = _Cycle(free.rate, 0.0)
    if one.pace is None or best_k == 0:
        return _Feed(one.num_staged, best_k, now, usual, math.inf, 1.0, plain, one.looked_up)
    first_s, redraft_s, token_s = one.pace.expected_wait_s(1, now_s), one.pace.redraft_s, one.pace.token_s
    if first_s is None and one.num_staged >= best_k:
        return _Feed(one.num_staged, best_k, now, usual, math.inf, 1.0, plain, one.looked_up)
    if first_s is None or redraft_s is None or token_s is None:
        return None
    cycle = _cycle(usual, best_k, redraft_s, token_s, num_sessions, curve, free)
    return _Feed(one.num_staged, best_k, now, usual, first_s, token_s, cycle, one.looked_up)


def _free_run(looked_up: Sequence[float], num_sessions: int, curve: StepCurve) -> _FreeRun:
    """The best step without drafts: a plain one, or one that verifies what was looked up."""
    gains = [0.0, *accumulate(looked_up)]
    runs = [_FreeRun(1.0 + gain, curve.at(num_sessions * (1 + count))) for count, gain in enumerate(gains)]
    return max(runs, key=lambda run: run.rate)


def _cycle(
    odds: _Odds,
    best_k: int,
    redraft_s: float,
    token_s: float,
    num_sessions: int,
    curve: StepCurve,
    free: _FreeRun,
) -> _Cycle:
    plain_s = curve.at(num_sessions)
    full_k = min(best_k, max(0, int(plain_s / max(token_s, 1e-9)) - 1))  # drafts that keep coming during a step
    full_s = curve.at(num_sessions * (1 + full_k))
    going_on = min(odds.agrees(full_k), MAX_GOING_ON)
    num_full = 1.0 / (1.0 - going_on)  # full steps of a streak, once begun

    num_free = max(1, math.ceil(redraft_s / free.step_s))  # free-runs until drafts are here
    num_overtaken = round(num_free * free.num_tokens)
    begins = odds.agrees(num_overtaken - 1) if num_overtaken <= len(odds) else 0.0
    tokens = num_free * free.num_tokens + begins * num_full * (1.0 + odds.gains[full_k])
    rate = tokens / (num_free * free.step_s + begins * num_full * full_s)
    for count in _counts(best_k):
        begins = odds.agrees(count)
        tokens = 1.0 + odds.gains[count] + begins * num_full * (1.0 + odds.gains[full_k])
        seconds = redraft_s + (count - 1) * token_s + curve.at(num_sessions * (1 + count)) + begins * num_full * full_s
        rate = max(rate, tokens / seconds)
    return _Cycle(rate, num_full * (1.0 + odds.gains[full_k] - rate * full_s))


def _value(feeds: Sequence[_Feed], wait_s: float, curve: StepCurve) -> float:
    """What running after ``wait_s`` is worth, in tokens; only differences mean something."""
    num_sessions = len(feeds)
    drafted = [min(feed.num_at(wait_s), feed.best_k) for feed in feeds]
    behind = _best_behind(feeds, drafted, curve)
    end_s = wait_s + curve.at(num_sessions + sum(drafted) + sum(map(len, behind)))
    value = 0.0
    for feed, depth, chances in zip(feeds, drafted, behind, strict=True):
        cycle = feed.cycle
        num_overtaken = sum(chances)
        value += 1.0 + feed.now.gains[depth] + num_overtaken - cycle.rate * end_s
        # staged for the step after, if it goes on
        num_next = min(feed.num_at(end_s) - depth - 1 - round(num_overtaken), feed.best_k)
        if num_next >= 0:
            next_s = curve.at(num_sessions * (1 + num_next))
            goes_on = 1.0 + feed.usual.gains[num_next] - cycle.rate * next_s
            goes_on += feed.usual.agrees(num_next) * cycle.streak
            value += feed.now.agrees(depth) * max(0.0, goes_on)
    return value


def _best_behind(feeds: Sequence[_Feed], drafted: Sequence[int], curve: StepCurve) -> list[tuple[float, ...]]:
    """Chances of the looked-up tokens that a step with so many drafts would take behind them, as `plan` trims them."""
    room = [max(0, len(feed.looked_up) + feed.num_staged - depth) for feed, depth in zip(feeds, drafted, strict=True)]
    ways = sorted(
        (
            (feed.now.reaches(depth) * chance, index)
            for index, (feed, depth, num_left) in enumerate(zip(feeds, drafted, room, strict=True))
            for chance in feed.looked_up[:num_left]
        ),
        reverse=True,
    )
    num_fixed = len(feeds) + sum(drafted)
    expected = len(feeds) + sum(feed.now.gains[depth] for feed, depth in zip(feeds, drafted, strict=True))
    chosen = ways[: _best_count(ways, len(feeds), num_fixed, curve, expected)]
    return [tuple(chance for chance, its in chosen if its == index) for index in range(len(feeds))]


def _waits_s(feeds: Sequence[_Feed], longest_s: float) -> list[float]:
    """Times, at most ``longest_s``, at which some session's n-th useful draft is expected."""
    return [
        wait_s
        for feed in feeds
        if feed.first_s <= longest_s
        for count in _counts(feed.best_k - feed.num_staged)
        if (wait_s := feed.first_s + (count - 1) * feed.token_s) <= longest_s
    ]


def _counts(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``: numbers of drafts worth a thought. Not all, as each arrival is planned anew anyway."""
    return [count for count in (1, 2, 4, 8, 16, 32) if count < most] + [most] * (most > 0)


def _chances(candidates: Sequence[Candidate], max_drafted: int, staged_only: bool = True) -> list[tuple[float, int]]:
    """``(survival, candidate index)`` of the drafted tokens that may enter the step, most likely first.

    ``staged_only`` False: as if everything up to K were staged by the drafter.
    """
    chances = [
        (chance, index)
        for index, candidate in enumerate(candidates)
        for chance in (candidate.chances if staged_only else candidate.now[: candidate.k])
    ]
    if len(candidates) > 1:
        chances.sort(reverse=True)
    return chances[: max(0, max_drafted)]


def _best_count(
    chances: Sequence[tuple[float, int]],
    num_sessions: int,
    num_fixed: int,
    curve: StepCurve,
    expected: float | None = None,
) -> int:
    """How many of ``chances`` to take for the most committed tokens per second; of equals the fewest.

    ``expected``: tokens that the ``num_fixed`` ones commit; one of each session unless said.
    """
    expected = float(num_sessions) if expected is None else expected
    best, best_rate = 0, expected / curve.at(num_fixed)
    for count, (chance, _) in enumerate(chances, start=1):
        expected += chance
        rate = expected / curve.at(num_fixed + count)
        if rate > best_rate:
            best, best_rate = count, rate
    return best
