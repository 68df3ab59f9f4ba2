"""What enters the next step of a draft worker: which lines of which sessions grow by one token.

One more drafted token is worth the chance that everything before it is right: only then can it save the target work.
So all growths of all sessions, main lines and branches alike, are sorted by that chance, and the step takes the number
of them with the highest sum of chances per second, by what steps have cost so far. Where branches do not hit, or
another row costs as much as another step, main lines are all that is left; where a row is nearly free, branches fill
the step.

A main line may also grow by several tokens at once: where what follows can be looked up in the sequence, the draft
model verifies that as the target verifies drafts. Each such token is one more row, worth the chance that it is reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

from speculation.cost import StepCostModel
from speculation.draft_lines import DraftLine, Growth
from speculation.drafter import DrafterSession
from speculation.guesses import Guess, GuessStatistics
from speculation.messages import OpenDraft, StepReport, TokenId
from speculation.prompt_lookup import NOTHING, LookedUp, LookupStatistics

IDLE_BELOW = 0.03
"""For a token that will be of use less often than this no step is made: the processor may be wanted elsewhere."""

MAX_DEPTH = 4
"""Tokens that lines grow by in one step, if nothing stands in the way: a commit waits for as long."""

MAX_DRAWN = 24
"""Tokens that a step of several for each line draws: with many lines it is their forward passes that take the time, and
not what comes between."""

REFIT_EVERY = 128
"""Steps after which their costs are looked at anew: a fit takes a fifth of a step."""


class HasDrafter(Protocol):
    """A session of a draft worker."""

    @property
    def drafter(self) -> DrafterSession: ...


SessionT = TypeVar("SessionT", bound=HasDrafter)


@dataclass(frozen=True, slots=True)
class DraftEntry(Generic[SessionT]):
    """What one line contributes to one forward pass."""

    session: SessionT
    line: DraftLine
    token_ids: list[TokenId]
    draws: bool
    """False for a prefill chunk that does not reach the end of the sequence: nothing is drawn for it."""
    looked_up: LookedUp = NOTHING
    """What may follow behind the token that is drawn next, for a main line."""
    num_looked_up: int = 0
    """How many of those the step verifies."""

    @property
    def verified(self) -> tuple[TokenId, ...]:
        """Tokens looked up that are in the step behind ``token_ids``; something is drawn behind each of them too."""
        return self.looked_up.token_ids[: self.num_looked_up]

    @property
    def num_draws(self) -> int:
        return 1 + self.num_looked_up if self.draws else 0

    def without_lookup(self) -> DraftEntry[SessionT]:
        """The same step with one token drawn."""
        return replace(self, num_looked_up=0)

    def extend(self, guesses: Sequence[Guess]) -> None:
        """They were drawn one behind the other, and all but the last are in the cache."""
        self.line.num_cached += len(guesses) - 1
        self.session.drafter.drafted_chain(self.line, self.looked_up, guesses)

    def conclude(self, guesses: Sequence[Guess]) -> int:
        """``num_draws`` guesses were drawn. Returns how many rows the cache is to lose: those of wrong tokens."""
        drafter = self.session.drafter
        if self.line is not drafter.main:
            drafter.drafted(self.line, guesses[0])
            return 0
        num_right = drafter.drafted_along(self.looked_up, self.num_looked_up, guesses)
        self.line.num_cached += num_right
        return self.num_looked_up - num_right


class DraftSchedule(Generic[SessionT]):
    """Chooses the steps of one draft worker and learns from them."""

    def __init__(self, max_step_tokens: int, looks_up: bool = True) -> None:
        """``max_step_tokens``: tokens of a step, prefill included. ``looks_up``: `speculation.prompt_lookup`."""
        self._max_step_tokens = max_step_tokens
        self._costs = StepCostModel(REFIT_EVERY)
        self._statistics = GuessStatistics()
        self._ratio_statistics = GuessStatistics()  # their guesses are of another kind
        self._lookups = LookupStatistics() if looks_up else None

    def open(self, command: OpenDraft, vocab_size: int, max_context: int) -> DrafterSession:
        """A session that starts from what the worker knows of its guesses, and adds to it."""
        statistics = self._ratio_statistics if command.sampling.by_ratio else self._statistics
        return DrafterSession(command, vocab_size, max_context, statistics, self._lookups)

    def next(self, sessions: Collection[SessionT]) -> list[DraftEntry[SessionT]]:
        """The lines of this step, those that need it least last; branches that begin are made."""
        ways = [
            way for session in sessions for growth in self._worthwhile(session) for way in self._ways(session, growth)
        ]
        ways.sort(key=lambda way: -way.reach)
        chosen = ways[: self._best_count([way.reach for way in ways])]
        num_looked_up = Counter(id(way.session) for way in chosen if way.growth is None)
        entries: list[DraftEntry[SessionT]] = []
        budget = self._max_step_tokens
        for way in chosen:
            if budget <= 0:
                break
            if way.growth is not None:
                entries.append(_entry(way.session, way.growth, budget, way.looked_up, num_looked_up[id(way.session)]))
                budget -= len(entries[-1].token_ids) + entries[-1].num_looked_up
        return entries

    def _ways(self, session: SessionT, growth: Growth) -> list[_Way[SessionT]]:
        """The growth, and for a main line the tokens looked up behind it, where it is known what another row costs."""
        if not growth.is_main or self._costs.curve(1, 1) is None:
            return [_Way(growth.reach, session, growth)]
        looked_up, chances = session.drafter.look_up()
        reaches = [growth.reach * chance for chance in chances]
        rows = [_Way(reach, session, None) for reach in reaches if reach >= IDLE_BELOW]
        return [_Way(growth.reach, session, growth, looked_up), *rows]

    def has_work(self, sessions: Collection[SessionT]) -> bool:
        """Will `next` find something to draft?"""
        return any(True for session in sessions for _ in self._worthwhile(session))

    def _worthwhile(self, session: SessionT) -> Iterator[Growth]:
        """Branches have to wait until it is known what a step costs.

        A session without branches gets its whole lookahead: if it takes turns, the target waits for all of it.
        """
        growths = session.drafter.growths()
        if not session.drafter.may_branch:
            return growths
        may_begin = self._costs.curve(1, 1) is not None
        return (growth for growth in growths if growth.reach >= IDLE_BELOW and (growth.is_main or may_begin))

    def _best_count(self, reaches: Sequence[float]) -> int:
        """How many of ``reaches``, best first, to take for the most useful tokens per second."""
        curve = self._costs.curve(1, 1)
        if curve is None:
            return len(reaches)
        total, best, best_rate = 0.0, 0, 0.0
        for count, reach in enumerate(reaches, start=1):
            total += reach
            rate = total / curve.at(count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def depth(self, entries: Sequence[DraftEntry[SessionT]]) -> int:
        """How many tokens each of the lines may grow by in this step, by a worker that can draw several in a row.

        1 where more than a line's next token is verified, or less than that is drawn.
        """
        if not all(entry.draws and not entry.num_looked_up for entry in entries):
            return 1
        num_missing = min(entry.session.drafter.num_missing(entry.line) for entry in entries)
        return max(1, min(num_missing, MAX_DEPTH, MAX_DRAWN // len(entries)))

    def report(self, entries: Sequence[DraftEntry[SessionT]], step_s: float, depth: int = 1) -> None:
        """What the step with these entries cost. Steps that also fed prompts say nothing about rows."""
        if sum(len(entry.token_ids) for entry in entries) <= 2 * len(entries):
            self._costs.observe(StepReport(step_s / depth, 1, sum(1 + entry.num_looked_up for entry in entries)))


class _Way(NamedTuple, Generic[SessionT]):
    """One more row of a step."""

    reach: float
    session: SessionT
    growth: Growth | None
    """None: one more token looked up behind the session's main line."""
    looked_up: LookedUp = NOTHING
    """All that was found behind a main line."""


def _entry(
    session: SessionT, growth: Growth, budget: int, looked_up: LookedUp, num_looked_up: int
) -> DraftEntry[SessionT]:
    line = session.drafter.grow(growth)
    uncached = session.drafter.uncached(line)
    chunk = uncached[:budget]
    draws = len(chunk) == len(uncached)
    if not draws or not growth.is_main:
        return DraftEntry(session, line, chunk, draws)
    return DraftEntry(session, line, chunk, draws, looked_up, min(num_looked_up, budget - len(chunk)))
