"""The draft worker's side of one session: what to feed the draft model next, and what to propose.

``committed + main line`` is the sequence as the drafter sees it; branches are other ways in which it may go on
(`speculation.draft_lines`). Of every line the draft model's cache holds a prefix; a commit that disagrees with a line
lowers its ``num_cached`` or drops it, and the engine follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from speculation.draft_lines import DraftLine, DraftLines, Growth, LineId
from speculation.fingerprint import Fingerprint, extend, fingerprint
from speculation.gathering import Departure
from speculation.guesses import Guess, GuessStatistics
from speculation.messages import Commit, OpenDraft, Proposal, TokenId
from speculation.prompt_lookup import NOTHING, LookedUp, LookupStatistics, PromptLookup

MAX_LOOKAHEAD = 256
"""A greater lookahead is cut to this: one session must not draft for ever."""

MAX_BRANCHES = 16
"""More branches are cut to this, for each takes memory."""

FIRST_TOGETHER = 2
"""Tokens of a branch that leave together first, and of the main line while the target is running a step. The target
says the first one itself; only the second saves a step."""

MAX_LOOKED_UP = 8
"""Tokens looked up that a step verifies behind a main line. It takes fewer where their chances do not pay."""

BRANCH_FLUSHES = 2
"""Times the tokens of the main line that leave together: so many of all branches do, when they leave alone."""


class CommitMismatch(ValueError):
    """A commit leaves a gap behind, or contradicts, what is committed already."""


class DrafterSession:
    """One session's committed tokens and the lines drafted beyond them."""

    def __init__(
        self,
        command: OpenDraft,
        vocab_size: int,
        max_context: int,
        statistics: GuessStatistics | None = None,
        lookups: LookupStatistics | None = None,
    ) -> None:
        """``statistics`` and ``lookups`` are the worker's: the session starts from them and adds to them.

        Without ``lookups`` nothing is looked up; nor under a grammar, or for ratios: when a draft comes must not depend
        on which token it is there.
        """
        self.sampling = command.sampling
        self.prompt_length = command.sampling.prompt_length or len(command.token_ids)
        self._lookahead = min(command.lookahead, MAX_LOOKAHEAD)
        self._vocab_size = vocab_size
        self._max_length = min(command.max_length or max_context, max_context)
        self._committed: list[TokenId] = list(command.token_ids)
        self._fingerprint = fingerprint(command.token_ids)
        max_branches = 0 if command.sampling.by_ratio else min(command.max_branches, MAX_BRANCHES)
        self._departure = Departure()
        self._lines = DraftLines(GuessStatistics(statistics), max_branches)
        looks_up = command.sampling.grammar is None and not command.sampling.by_ratio
        self._lookup = PromptLookup(lookups) if lookups is not None and looks_up else None

    @property
    def num_committed(self) -> int:
        return len(self._committed)

    @property
    def committed(self) -> Sequence[TokenId]:
        """Prompt and committed tokens; a live view, not to be changed."""
        return self._committed

    @property
    def may_branch(self) -> bool:
        return self._lines.max_branches > 0

    @property
    def main(self) -> DraftLine:
        """Where the drafter believes that the target will go."""
        return self._lines.main

    @property
    def lines(self) -> Sequence[DraftLine]:
        """The main line and all branches."""
        return [self._lines.main, *self._lines.branches]

    @property
    def line_ids(self) -> set[LineId]:
        return self._lines.ids

    def set_lookahead(self, lookahead: int) -> None:
        """Draft at most so far ahead. 0 pauses: what is drafted goes too, as nobody keeps what of it was sent."""
        self._lookahead = min(lookahead, MAX_LOOKAHEAD)
        if lookahead == 0:
            self._lines.pause(len(self._committed))

    def growths(self) -> Iterator[Growth]:
        """All ways to draft one more token. Only the first may be the main line's."""
        if self._lookahead == 0:
            return iter(())
        return self._lines.growths(self._lookahead, self._max_length - len(self._committed))

    def num_missing(self, line: DraftLine) -> int:
        """By how many tokens ``line`` may grow."""
        return self._lines.num_missing(line, self._lookahead, self._max_length - len(self._committed))

    def look_up(self) -> tuple[LookedUp, tuple[float, ...]]:
        """What may follow the main line, and P(the first d of those are drafted) for d = 1, 2, ..."""
        if self._lookup is None:
            return NOTHING, ()
        main = self._lines.main
        room = min(self._lookahead, self._max_length - len(self._committed)) - len(main) - 1
        looked_up = self._lookup.find(self._committed, main.token_ids, min(room, MAX_LOOKED_UP))
        return looked_up, self._lookup.chances(looked_up)

    def grow(self, growth: Growth) -> DraftLine:
        """The line that ``growth`` extends, which is a new branch if it says so."""
        return growth.line if growth.line is not None else self._lines.begin(growth, len(self._committed))

    def give_up(self, branch: DraftLine) -> None:
        """There is no memory for the branch."""
        self._lines.give_up(branch)

    def sequence(self, line: DraftLine) -> list[TokenId]:
        """All tokens from the start of the prompt to the end of ``line``."""
        return self._committed + self.ahead(line)

    def uncached(self, line: DraftLine) -> list[TokenId]:
        """Tokens that the draft model has to run before it can draw the line's next one; at least one."""
        if line.num_cached < len(self._committed):
            return self._committed[line.num_cached :] + self.ahead(line)
        return self.ahead(line)[line.num_cached - len(self._committed) :]

    def position(self, line: DraftLine) -> int:
        """Of the line's next token."""
        return len(self._committed) + line.start + len(line)

    def fingerprint(self, line: DraftLine) -> Fingerprint:
        """Of all tokens up to the end of ``line``."""
        return self._after_committed(self.ahead(line))

    def _after_committed(self, token_ids: Sequence[TokenId]) -> Fingerprint:
        found = self._fingerprint
        for token_id in token_ids:
            found = extend(found, token_id)
        return found

    def ahead(self, line: DraftLine) -> list[TokenId]:
        """The drafted tokens from the committed ones to the end of ``line``."""
        return self._lines.main.token_ids[: line.start] + line.token_ids

    def drafted(self, line: DraftLine, guess: Guess) -> None:
        """The draft model drew ``guess`` at the end of ``line``."""
        self._lines.add(line, guess)

    def drafted_chain(self, line: DraftLine, looked_up: LookedUp, guesses: Sequence[Guess]) -> None:
        """The draft model drew ``guesses`` one behind the other; ``looked_up`` is what was found behind a main line."""
        for guess in guesses:
            self._lines.add(line, guess)
        if self._lookup is not None and line is self._lines.main:
            self._lookup.observe(looked_up, [guess.token_id for guess in guesses])

    def drafted_along(self, looked_up: LookedUp, num_tokens: int, guesses: Sequence[Guess]) -> int:
        """The draft model drew ``guesses`` at the end of the main line and behind ``num_tokens`` tokens looked up.

        One that was looked up stands if it is what was drawn there: what is drafted is the same as one at a time.
        Returns how many stand.
        """
        num_right = 0
        for guess in guesses:
            self._lines.add(self._lines.main, guess)
            if num_right == num_tokens or guess.token_id != looked_up.token_ids[num_right]:
                break
            num_right += 1
        if self._lookup is not None:
            self._lookup.observe(looked_up, [guess.token_id for guess in guesses[: num_right + 1]])
        return num_right

    def commit(self, command: Commit, now_s: float = 0.0) -> None:
        """Follows the target: what agrees stays drafted, the rest is dropped at once, unsent tokens included.

        ``now_s`` is when the command arrived.

        Raises `CommitMismatch` on a gap, a contradiction or an unknown token; the session is of no use then.
        """
        if any(token_id >= self._vocab_size for token_id in command.token_ids):
            raise CommitMismatch(f"a committed token is outside the vocabulary [0, {self._vocab_size})")
        known = self._committed[command.start : command.start + len(command.token_ids)]
        if command.start > len(self._committed) or tuple(known) != command.token_ids[: len(known)]:
            raise CommitMismatch(
                f"commit at [{command.start}, {command.start + len(command.token_ids)}) does not continue "
                f"the {len(self._committed)} committed tokens"
            )
        self._advance(command.token_ids[len(known) :])
        self._departure.on_news(command.gather_s, now_s)

    def _advance(self, token_ids: Sequence[TokenId]) -> None:
        self._lines.commit(token_ids, len(self._committed))
        for token_id in token_ids:
            self._fingerprint = extend(self._fingerprint, token_id)
        self._committed.extend(token_ids)

    def take_proposals(self, flush_tokens: int, now_s: float = 0.0, next_s: float = math.inf) -> list[Proposal]:
        """What is to be sent now; it will be asked again at ``next_s``, the end of the next step (inf: there is none).

        Drafts that may gather leave together when the target needs them (`speculation.gathering`). Otherwise at most
        ``flush_tokens`` of the main line wait to leave together. The first token after a miss goes at once, the target
        may be waiting for it; then 1, 2, 4, ... together. Branches go along with the main line. While that has nothing
        to send they gather, unless nothing more is going to be drafted (``flush_tokens`` 1): every frame interrupts the
        target's step.
        """
        if self._departure.may_wait_until(next_s) or (self._departure.gathers and self._is_too_short):
            return []
        return self._leave(flush_tokens, now_s)

    def take_along(self, now_s: float) -> list[Proposal]:
        """What would be due soon, when a frame is leaving in any case."""
        return self._leave(1, now_s) if self._departure.may_go_along(now_s) else []

    def _leave(self, flush_tokens: int, now_s: float) -> list[Proposal]:
        gathers = self._departure.gathers
        self._departure.on_left(now_s)
        return self._due_proposals(1 if gathers else flush_tokens, now_s)

    @property
    def _is_growing(self) -> bool:
        return len(self.main) < min(self._lookahead, self._max_length - len(self._committed))

    @property
    def _is_too_short(self) -> bool:
        return self._is_growing and not self.main.num_sent and 0 < len(self.main) < FIRST_TOGETHER

    def _due_proposals(self, flush_tokens: int, now_s: float) -> list[Proposal]:
        main = self._lines.main
        if main.num_unsent and self._is_growing and main.num_unsent < min(max(main.num_sent, 1), flush_tokens):
            return []
        proposals = [self._propose(main, now_s)] if main.num_unsent else []
        branches = [branch for branch in self._lines.branches if self._is_sendable(branch)]
        num_due = BRANCH_FLUSHES * flush_tokens if flush_tokens > 1 else 1
        if proposals or sum(branch.num_unsent for branch in branches) >= num_due:
            proposals += [self._propose(branch, now_s) for branch in branches]
        return proposals

    def _is_sendable(self, branch: DraftLine) -> bool:
        num_due = 1 if branch.num_sent else FIRST_TOGETHER
        return branch.num_unsent >= num_due and branch.start < self._lines.main.num_sent  # else its place is unknown

    def _propose(self, line: DraftLine, now_s: float) -> Proposal:
        before = self._lines.main.token_ids[: line.start] + line.token_ids[: line.num_sent]
        proposal = Proposal(
            prefix_length=len(self._committed) + len(before),
            prefix_fingerprint=self._after_committed(before),
            token_ids=tuple(line.token_ids[line.num_sent :]),
            confidences=tuple(line.chances[line.num_sent :]),
            is_branch=line is not self._lines.main,
            distributions=line.unsent_distributions(),
            num_committed=len(self._committed),
            held_s=self._departure.held_s(now_s),
        )
        line.num_sent = len(line)
        return proposal


def take_frame(
    drafters: Sequence[DrafterSession], flush_tokens: int, now_s: float, next_s: float = math.inf
) -> list[list[Proposal]]:
    """`take_proposals` of each session, where those of all travel in one frame."""
    taken = [drafter.take_proposals(flush_tokens, now_s, next_s) for drafter in drafters]
    if not any(taken):
        return taken
    return [found or drafter.take_along(now_s) for found, drafter in zip(taken, drafters, strict=True)]
