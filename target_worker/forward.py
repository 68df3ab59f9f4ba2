"""One packed forward pass over the entries of a step, and the target's own draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from grammar import GrammarError, Mask
from inference import Chunk, OutOfKVBlocks, Runtime, SamplingRow, SequenceId, draw, logprobs, warped
from speculation.messages import SessionError, SessionErrorCode, TokenId, TokenLogprobs
from target_worker.ratio_verification import Judged, verify_by_ratio
from target_worker.sessions import SessionKey, TargetEntry, TargetSession

Masks: TypeAlias = "dict[SequenceId, list[Mask]]"
"""For each session with a grammar what it allows at each of its rows."""

MAX_TOP_LOGPROBS = 64
"""More are cut to this, whatever a coordinator asks for."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the target says at the rows of one entry."""

    draws: list[TokenId]
    """``draws[i]`` follows the committed tokens and ``drafted[:i]``; ``num_draws`` of them."""
    logprobs: list[TokenLogprobs]
    """As many, if the session asked for them."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One entry among the rows that are drawn from."""

    entry: TargetEntry
    rows: Sequence[SamplingRow]
    """How each is drawn; none if the entry draws nothing."""
    start: int
    """Of its rows among the logits."""

    @property
    def positions(self) -> range:
        """Of the tokens that are drawn."""
        start = len(self.entry.session.verifier.token_ids)
        return range(start, start + len(self.rows))


class VerifyForward:
    """Runs steps; makes them smaller when KV memory is short."""

    def __init__(
        self,
        runtime: Runtime,
        vocab_size: int,
        preempt: Callable[[TargetSession], None],
        make_room: Callable[[SessionKey], bool],
        fail: Callable[[SessionKey, SessionError], None],
    ) -> None:
        """``make_room`` preempts a session other than the one named, if any holds memory; ``fail`` gives one up."""
        self._runtime = runtime
        self._vocab_size = vocab_size
        self._preempt = preempt
        self._make_room = make_room
        self._fail = fail

    def run(self, entries: list[TargetEntry]) -> tuple[list[TargetEntry], list[Outcome]]:
        """The entries that ran, possibly fewer and without drafted tokens, and the outcome of each."""
        entries, masks = self._constrain(entries)
        while entries:
            chunks = [Chunk(entry.session.sequence, entry.token_ids, entry.num_logits) for entry in entries]
            try:
                logits = self._runtime.forward(chunks)
            except OutOfKVBlocks as error:
                entries = self._shrink(entries, error)
                continue
            outcomes = self._draw(self._take_prompts(logits, entries), entries, masks)
            for entry in entries:
                entry.session.num_cached += len(entry.token_ids)
            return entries, outcomes
        return [], []

    def _constrain(self, entries: list[TargetEntry]) -> tuple[list[TargetEntry], Masks]:
        """Cuts drafted tokens that a grammar forbids, and finds what it allows at each row of the others."""
        masks: Masks = {}
        if all(entry.session.path is None for entry in entries):
            return entries, masks
        allowed: list[TargetEntry] = []
        for entry in entries:
            path = entry.session.path
            if path is not None and entry.is_complete:
                try:
                    path.follow(entry.session.verifier.token_ids)
                    entry = entry.cut(path.num_allowed(entry.drafted))
                    masks[entry.session.sequence] = path.masks(entry.drafted)
                except GrammarError as error:
                    self._fail(entry.session.key, SessionError(SessionErrorCode.INVALID, f"grammar: {error}"))
                    continue
            allowed.append(entry)
        return allowed, masks

    def _shrink(self, entries: list[TargetEntry], error: OutOfKVBlocks) -> list[TargetEntry]:
        """What was looked up goes first, then drafts, then the youngest session, for later; a lone one fails."""
        if any(entry.num_looked_up for entry in entries):
            return [entry.without_lookup() for entry in entries]
        if any(entry.drafted for entry in entries):
            return [entry.without_drafted() for entry in entries]
        *older, youngest = entries
        if older:
            self._preempt(youngest.session)
            return older
        if self._make_room(youngest.session.key):
            return entries
        self._fail(youngest.session.key, SessionError(SessionErrorCode.OUT_OF_MEMORY, str(error)))
        return []

    def _take_prompts(self, logits: Tensor, entries: Sequence[TargetEntry]) -> Tensor:
        """Keeps the logprobs of prompts and returns the rows that are drawn from."""
        if not any(entry.num_prompt_logits for entry in entries):
            return logits
        drawn: list[int] = []
        start = 0
        for entry in entries:
            middle, stop = start + entry.num_prompt_logits, start + entry.num_logits
            self._take_prompt(logits[start:middle], entry)
            drawn.extend(range(middle, stop))
            start = stop
        return logits[drawn]

    def _take_prompt(self, logits: Tensor, entry: TargetEntry) -> None:
        """Row ``i`` tells of the token behind the chunk's ``i``-th; some are known if the session was preempted."""
        session, num_top = entry.session, entry.session.verifier.prompt_logprobs
        num_known = len(session.prompt_logprobs) - session.num_cached
        if num_top is None or num_known >= len(logits):
            return
        first = session.num_cached + num_known + 1
        token_ids = session.verifier.token_ids[first : first + len(logits) - num_known]
        session.prompt_logprobs += self._logprobs(logits[num_known:], token_ids, num_top)

    def _draw(self, logits: Tensor, entries: Sequence[TargetEntry], masks: Masks) -> list[Outcome]:
        parts = _parts(entries, masks)
        drawn = self._decide(logits, parts)
        return [
            Outcome(draws, self._logprobs_of(logits, part, draws)) for part, draws in zip(parts, drawn, strict=True)
        ]

    def _decide(self, logits: Tensor, parts: Sequence[_Part]) -> list[list[TokenId]]:
        """The target's tokens of each part: drawn, or kept and drawn by the ratio rules if a session asks for that."""
        judged = {index: one for index, part in enumerate(parts) if (one := _judged(part)) is not None}
        if not judged:
            return self._draw_tokens(logits, parts)
        others = [index for index in range(len(parts)) if index not in judged]
        other_parts = [parts[index] for index in others]
        drawn = self._draw_tokens(_rows_of(logits, other_parts), other_parts)
        its_logits = _rows_of(logits, [parts[index] for index in judged])
        kept = verify_by_ratio(its_logits, list(judged.values()), self._vocab_size)
        tokens = dict(zip([*others, *judged], [*drawn, *kept], strict=True))
        return [tokens[index] for index in range(len(parts))]

    def _draw_tokens(self, logits: Tensor, parts: Sequence[_Part]) -> list[list[TokenId]]:
        """``logits`` are the rows of these parts."""
        rows = [row for part in parts for row in part.rows]
        positions = [position for part in parts for position in part.positions]
        token_ids = draw(logits, rows, positions, limit=self._vocab_size).token_ids if rows else []
        rest = iter(token_ids)
        return [list(itertools.islice(rest, len(part.rows))) for part in parts]

    def _logprobs_of(self, logits: Tensor, part: _Part, draws: Sequence[TokenId]) -> list[TokenLogprobs]:
        options = part.entry.session.verifier.logprobs
        if options is None or not draws:
            return []
        scores = logits[part.start : part.start + len(draws)]
        if options.processed:
            scores = warped(scores, part.rows[: len(draws)], limit=self._vocab_size)
        return self._logprobs(scores, draws, options.num_top)

    def _logprobs(self, scores: Tensor, token_ids: Sequence[TokenId], num_top: int) -> list[TokenLogprobs]:
        found = logprobs(scores, token_ids, min(num_top, MAX_TOP_LOGPROBS), limit=self._vocab_size)
        return [TokenLogprobs(one.logprob, one.top) for one in found]


def _parts(entries: Sequence[TargetEntry], masks: Masks) -> list[_Part]:
    parts, start = [], 0
    for entry in entries:
        rows = _rows(entry, masks.get(entry.session.sequence)) if entry.is_complete else []
        parts.append(_Part(entry, rows, start))
        start += len(rows)
    return parts


def _rows(entry: TargetEntry, masks: Sequence[Mask] | None) -> list[SamplingRow]:
    """The rows that an entry draws from. There may be more masks: its drafted tokens went when memory was short."""
    rows = entry.session.rows.rows(entry.session.verifier.token_ids, entry.drafted)
    if masks is None:
        return rows
    return [row if mask is None else row.with_allowed(mask) for row, mask in zip(rows, masks, strict=False)]


def _rows_of(logits: Tensor, parts: Sequence[_Part]) -> Tensor:
    """The logits of some of the parts; a copy costs time, and most steps need none."""
    chosen = [row for part in parts for row in range(part.start, part.start + len(part.rows))]
    return logits if len(chosen) == len(logits) else logits[chosen]


def _judged(part: _Part) -> Judged | None:
    """None where the tokens are drawn: the session is coupled, has nothing staged, or no row to judge by."""
    verifier = part.entry.session.verifier
    if not verifier.sampling.by_ratio or not part.rows:
        return None
    staged = verifier.staged_behind(part.entry.drafted)
    if not staged:
        return None
    return Judged(verifier.sampling.method, part.rows, part.positions.start, len(part.entry.drafted), staged)
