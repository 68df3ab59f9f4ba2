"""What enters the next step of a draft worker: which lines of which sessions grow by one token.

One more drafted token is worth the chance that everything before it is right: only then can it save the target work.
So all growths of all sessions, main lines and branches alike, are sorted by that chance, and the step takes the number
of them with the highest sum of chances per second, by what steps have cost so far. Where branches do not hit, or
another row costs as much as another step, main lines are all that is left; where a row is nearly free, branches fill
the step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from speculation.cost import StepCostModel
from speculation.draft_lines import DraftLine, Growth
from speculation.drafter import DrafterSession
from speculation.guesses import GuessStatistics
from speculation.messages import OpenDraft, StepReport, TokenId

IDLE_BELOW = 0.03
"""A token that will be of use less often than this is not drafted at all: the processor may be wanted elsewhere."""


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


class DraftSchedule(Generic[SessionT]):
    """Chooses the steps of one draft worker and learns from them."""

    def __init__(self, max_step_tokens: int) -> None:
        self._max_step_tokens = max_step_tokens
        self._costs = StepCostModel(REFIT_EVERY)
        self._statistics = GuessStatistics()
        self._ratio_statistics = GuessStatistics()  # their guesses are of another kind

    def open(self, command: OpenDraft, vocab_size: int, max_context: int) -> DrafterSession:
        """A session that starts from what the worker knows of its guesses, and adds to it."""
        statistics = self._ratio_statistics if command.sampling.by_ratio else self._statistics
        return DrafterSession(command, vocab_size, max_context, statistics)

    def next(self, sessions: Collection[SessionT]) -> list[DraftEntry[SessionT]]:
        """The lines of this step, those that need it least last; branches that begin are made."""
        ways = [(growth, session) for session in sessions for growth in self._worthwhile(session)]
        ways.sort(key=lambda way: -way[0].reach)
        entries: list[DraftEntry[SessionT]] = []
        budget = self._max_step_tokens
        for growth, session in ways[: self._best_count([growth for growth, _ in ways])]:
            if budget <= 0:
                break
            line = session.drafter.grow(growth)
            uncached = session.drafter.uncached(line)
            chunk = uncached[:budget]
            entries.append(DraftEntry(session, line, chunk, len(chunk) == len(uncached)))
            budget -= len(chunk)
        return entries

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

    def _best_count(self, growths: Sequence[Growth]) -> int:
        """How many of ``growths``, best first, to take for the most useful tokens per second."""
        curve = self._costs.curve(1, 1)
        if curve is None:
            return len(growths)
        total, best, best_rate = 0.0, 0, 0.0
        for count, growth in enumerate(growths, start=1):
            total += growth.reach
            rate = total / curve.at(count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def report(self, entries: Sequence[DraftEntry[SessionT]], step_s: float) -> None:
        """What the step with these entries cost. Steps that also fed prompts say nothing about rows."""
        num_tokens = sum(len(entry.token_ids) for entry in entries)
        if num_tokens <= 2 * len(entries):
            self._costs.observe(StepReport(step_s, 1, len(entries)))
