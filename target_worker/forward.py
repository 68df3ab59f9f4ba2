"""One packed forward pass over the entries of a step, and the target's own draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inference import Chunk, OutOfKVBlocks, Runtime, SamplingRow, draw
from speculation.messages import Sampling, SessionError, SessionErrorCode, TokenId
from target_worker.ratio_verification import Judged, verify_by_ratio
from target_worker.sessions import SessionKey, TargetEntry


class VerifyForward:
    """Runs steps; makes them smaller when KV memory is short."""

    def __init__(
        self,
        runtime: Runtime,
        vocab_size: int,
        make_room: Callable[[SessionKey], bool],
        fail: Callable[[SessionKey, SessionError], None],
    ) -> None:
        """``make_room`` preempts a session other than the one named, if any holds memory; ``fail`` gives one up."""
        self._runtime = runtime
        self._vocab_size = vocab_size
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
            return entries, self._decide(logits, entries)
        return [], []

    def _shrink(self, entries: list[TargetEntry], error: OutOfKVBlocks) -> list[TargetEntry]:
        """Drafted tokens go first, then the youngest session, which is computed again later; a lone one fails."""
        if any(entry.drafted for entry in entries):
            return [entry.without_drafted() for entry in entries]
        *older, youngest = entries
        if older:
            youngest.session.preempt(self._runtime)
            return older
        if self._make_room(youngest.session.key):
            return entries
        self._fail(youngest.session.key, SessionError(SessionErrorCode.OUT_OF_MEMORY, str(error)))
        return []

    def _decide(self, logits: Tensor, entries: Sequence[TargetEntry]) -> list[list[TokenId]]:
        """The target's tokens of each entry, by its session's method."""
        judged = {index: one for index, entry in enumerate(entries) if (one := _judged(entry)) is not None}
        if not judged:
            return self._draw(logits, entries)
        parts = torch.split_with_sizes(logits, [entry.num_logits for entry in entries])
        others = [index for index in range(len(entries)) if index not in judged]
        drawn = self._draw(torch.cat([logits[:0], *(parts[i] for i in others)]), [entries[i] for i in others])
        kept = verify_by_ratio(torch.cat([parts[index] for index in judged]), list(judged.values()), self._vocab_size)
        tokens = dict(zip([*others, *judged], [*drawn, *kept], strict=True))
        return [tokens[index] for index in range(len(entries))]

    def _draw(self, logits: Tensor, entries: Sequence[TargetEntry]) -> list[list[TokenId]]:
        rows: list[SamplingRow] = []
        positions: list[int] = []
        for entry in entries:
            row = _settings(entry.session.verifier.sampling)
            start = len(entry.session.verifier.token_ids)
            rows.extend([row] * entry.num_logits)
            positions.extend(range(start, start + entry.num_logits))
        token_ids = draw(logits, rows, positions, limit=self._vocab_size).token_ids if rows else []
        draws, start = [], 0
        for entry in entries:
            draws.append(token_ids[start : start + entry.num_logits])
            start += entry.num_logits
        return draws


def _judged(entry: TargetEntry) -> Judged | None:
    """None where the tokens are drawn: the session is coupled, or has nothing staged, or no row to judge by."""
    verifier = entry.session.verifier
    if not verifier.sampling.by_ratio or not entry.is_complete:
        return None
    staged = verifier.staged_behind(entry.drafted)
    if not staged:
        return None
    sampling = verifier.sampling
    return Judged(sampling.method, _settings(sampling), len(verifier.token_ids), len(entry.drafted), staged)


def _settings(sampling: Sampling) -> SamplingRow:
    return SamplingRow(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)
