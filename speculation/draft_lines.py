"""What a drafter has drafted beyond the committed tokens: a main line, and branches for where it may be wrong.

A branch leaves the main line behind ``start`` of its tokens, with a runner-up in place of the main line's guess, and
goes on from there. When the target says that runner-up, the branch becomes the main line: with its cache, with what
has been sent of it, and at no delay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NewType

from speculation.draft_distribution import DraftDistribution
from speculation.guesses import Guess, GuessStatistics
from speculation.messages import TokenId

LineId = NewType("LineId", int)


@dataclass(slots=True)
class DraftLine:
    """A chain of guesses. The draft model's cache holds the first ``num_cached`` tokens of the sequence it ends."""

    id: LineId
    num_cached: int
    """Tokens from the start of the prompt, drafted ones of this line included."""
    start: int = 0
    """Tokens of the main line that come before it; 0 for the main line itself."""
    guesses: list[Guess] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    """P(guess is right, given that what comes before it is), as it was believed when it was made."""
    runner_up_chances: list[tuple[float, ...]] = field(default_factory=list)
    """The same of each guess's runners-up."""
    num_branched: list[int] = field(default_factory=list)
    """How many runners-up of each guess have a branch already; on the main line only."""
    num_sent: int = 0

    def __len__(self) -> int:
        return len(self.guesses)

    @property
    def token_ids(self) -> list[TokenId]:
        return [guess.token_id for guess in self.guesses]

    @property
    def num_unsent(self) -> int:
        """Guesses that no proposal has carried yet."""
        return len(self.guesses) - self.num_sent

    def unsent_distributions(self) -> tuple[DraftDistribution, ...]:
        """What those were drawn from; empty where that is not to be told."""
        unsent = self.guesses[self.num_sent :]
        return tuple(guess.distribution for guess in unsent if guess.distribution is not None)

    def append(self, guess: Guess, chance: float, runner_up_chances: tuple[float, ...] = ()) -> None:
        self.guesses.append(guess)
        self.chances.append(chance)
        self.runner_up_chances.append(runner_up_chances)
        self.num_branched.append(0)

    def reach(self, depth: int) -> float:
        """P(the first ``depth`` guesses are right)."""
        product = 1.0
        for chance in self.chances[:depth]:
            product *= chance
        return product

    def drop_first(self, count: int) -> None:
        """They have been committed."""
        del self.guesses[:count], self.chances[:count], self.runner_up_chances[:count], self.num_branched[:count]
        self.num_sent = max(0, self.num_sent - count)

    def drop_all(self) -> None:
        self.drop_first(len(self))

    def num_agreeing(self, token_ids: Sequence[TokenId]) -> int:
        """How many of ``token_ids`` this line begins with."""
        num_agreeing = 0
        for guess, token_id in zip(self.guesses, token_ids, strict=False):
            if guess.token_id != token_id:
                break
            num_agreeing += 1
        return num_agreeing


class Growth(NamedTuple):
    """One way to draft one more token of a session."""

    # A tuple, because a dozen are made in every step.
    reach: float
    """P(everything up to the place of that token is right): what the token is worth, if it is right itself."""
    line: DraftLine | None
    """The line to extend; None: begin a branch."""
    is_main: bool = False
    start: int = 0
    """Of the new branch."""
    rank: int = 0
    """Of the runner-up that it begins with."""


class DraftLines:
    """The lines of one session."""

    def __init__(self, statistics: GuessStatistics, max_branches: int) -> None:
        """At most ``max_branches`` branches are held at a time."""
        self._statistics = statistics
        self.max_branches = max_branches
        self._next_id = 1
        self.main = DraftLine(LineId(0), 0)
        self.branches: list[DraftLine] = []

    @property
    def ids(self) -> set[LineId]:
        return {self.main.id, *(branch.id for branch in self.branches)}

    def growths(self, lookahead: int, room: int) -> Iterator[Growth]:
        """All ways to grow, the main line's first, within ``lookahead`` drafted tokens and ``room`` until the end."""
        reaches = self._reaches()
        if self.num_missing(self.main, lookahead, room) > 0:
            yield Growth(reaches[-1], self.main, is_main=True)
        for branch in self.branches:
            if self.num_missing(branch, lookahead, room) > 0:
                yield Growth(reaches[branch.start] * branch.reach(len(branch)), branch)
        if lookahead // 2 > 1 and len(self.branches) < self.max_branches:
            yield from self._new_branches(reaches, room)

    def num_missing(self, line: DraftLine, lookahead: int, room: int) -> int:
        """By how many tokens ``line`` may grow; as for `growths`."""
        if line is self.main:
            return min(lookahead, room) - len(line)
        longest = lookahead // 2  # a whole step, its own token included; the next one begins with the main line anew
        return min(longest, room - line.start) - len(line)

    def _reaches(self) -> list[float]:
        """By depth: P(the first so many guesses of the main line are right)."""
        reaches = [1.0]
        for chance in self.main.chances:
            reaches.append(reaches[-1] * chance)
        return reaches

    def _new_branches(self, reaches: Sequence[float], room: int) -> Iterator[Growth]:
        main = self.main
        for start, (chances, rank) in enumerate(zip(main.runner_up_chances, main.num_branched, strict=True)):
            if rank < len(chances) and start + 1 < room:
                yield Growth(reaches[start] * chances[rank], None, start=start, rank=rank)

    def begin(self, growth: Growth, num_committed: int) -> DraftLine:
        """Makes the branch that ``growth`` proposes. Its cache is the main line's, up to where it leaves."""
        runner_up = self.main.guesses[growth.start].runners_up[growth.rank]
        chance = self.main.runner_up_chances[growth.start][growth.rank]
        branch = DraftLine(LineId(self._next_id), num_committed + growth.start, growth.start)
        branch.append(Guess(runner_up.token_id, 0.0, ()), chance)
        self._next_id += 1
        self.main.num_branched[growth.start] = growth.rank + 1
        self.branches.append(branch)
        return branch

    def give_up(self, branch: DraftLine) -> None:
        """There is no memory for it."""
        self.branches.remove(branch)

    def add(self, line: DraftLine, guess: Guess) -> None:
        """The draft model drew it at the end of ``line``."""
        line.append(guess, self._statistics.chance(guess), self._statistics.runner_up_chances(guess))

    def commit(self, token_ids: Sequence[TokenId], num_committed: int) -> None:
        """Follows the target, which had ``num_committed`` tokens before: what agrees stays, the rest is dropped."""
        num_agreeing = self.main.num_agreeing(token_ids)
        self._learn(token_ids, num_agreeing)
        if num_agreeing == len(token_ids):
            self.main.drop_first(num_agreeing)
            self.branches = [branch for branch in self.branches if branch.start >= num_agreeing]
            for branch in self.branches:
                branch.start -= num_agreeing
            return
        following = self._following(token_ids, num_agreeing)
        if following is None:
            self.main.num_cached = min(self.main.num_cached, num_committed + num_agreeing)
            self.main.drop_all()
        else:
            following.drop_first(len(token_ids) - following.start)
            following.start = 0
            self.main = following
        self.branches = []

    def _following(self, token_ids: Sequence[TokenId], num_agreeing: int) -> DraftLine | None:
        """The branch that has ``token_ids``, which leave the main line after ``num_agreeing``."""
        rest = token_ids[num_agreeing:]
        for branch in self.branches:
            if branch.start == num_agreeing and branch.num_agreeing(rest) == len(rest):
                return branch
        return None

    def _learn(self, token_ids: Sequence[TokenId], num_agreeing: int) -> None:
        for guess, token_id in zip(self.main.guesses[: num_agreeing + 1], token_ids, strict=False):
            self._statistics.observe(guess, token_id)

    def pause(self, num_committed: int) -> None:
        """Nothing is drafted for a while, and nobody keeps what has been sent."""
        self.main.num_cached = min(self.main.num_cached, num_committed)
        self.main.drop_all()
        self.branches = []
