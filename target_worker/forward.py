"""One packed forward pass over the entries of a step, and the target's own draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from inference import Chunk, OutOfKVBlocks, Runtime, SamplingRow, draw
from speculation.messages import SessionError, SessionErrorCode, TokenId
from target_worker.sessions import SessionKey, TargetEntry, TargetSession


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

    def run(self, entries: list[TargetEntry]) -> tuple[list[TargetEntry], list[list[TokenId]]]:
        """The entries that ran, possibly fewer and without drafted tokens, and the draws of each.

        An entry has ``num_logits`` draws: ``draws[i]`` follows its committed tokens and ``drafted[:i]``.
        """
        while entries:
            chunks = [Chunk(entry.session.sequence, entry.token_ids, entry.num_logits) for entry in entries]
            try:
                logits = self._runtime.forward(chunks)
            except OutOfKVBlocks as error:
                entries = self._shrink(entries, error)
                continue
            for entry in entries:
                entry.session.num_cached += len(entry.token_ids)
            return entries, self._draw(logits, entries)
        return [], []

    def _shrink(self, entries: list[TargetEntry], error: OutOfKVBlocks) -> list[TargetEntry]:
        """Drafted tokens go first, then the youngest session, which is computed again later; a lone one fails."""
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

    def _draw(self, logits: Tensor, entries: Sequence[TargetEntry]) -> list[list[TokenId]]:
        rows: list[SamplingRow] = []
        positions: list[int] = []
        for entry in entries:
            if entry.is_complete:
                committed = entry.session.verifier.token_ids
                rows.extend(entry.session.rows.rows(committed, entry.drafted))
                positions.extend(range(len(committed), len(committed) + entry.num_logits))
        token_ids = draw(logits, rows, positions, limit=self._vocab_size).token_ids if rows else []
        draws, start = [], 0
        for entry in entries:
            draws.append(token_ids[start : start + entry.num_logits])
            start += entry.num_logits
        return draws
