"""Plain decoding, what the draft foresees of it, and its verification several tokens at a time.

All three draw with the same noise. A verification goes as in service: the last committed token and up to K drafted ones
in one pass, what agrees is committed, the rest rolled back. Where it draws another token than plain decoding, that is
noted, and it goes on with plain decoding's; so one divergence does not hide the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from inference import Chunk, PagedRuntime, SamplingRow, SequenceId, draw, gumbel
from outrider.doctor.divergence import Divergence, TokenScore, Verified, bound_of
from outrider.doctor.rounding import Rounding


@dataclass(frozen=True, slots=True)
class PlainText:
    """What the target says after a prompt, one token at a time, alone."""

    prompt_index: int
    prompt: Sequence[int]
    row: SamplingRow
    token_ids: Sequence[int]
    logits: torch.Tensor
    """float32 [len(token_ids), vocab_size]: row i is the one that token i was drawn from."""
    guesses: Sequence[int] = ()
    """The draft's draws after the same tokens; may end early."""

    @property
    def trace(self) -> list[bool]:
        """Which of its tokens the draft foresaw."""
        return [guess == token_id for guess, token_id in zip(self.guesses, self.token_ids, strict=False)]


def decode_plainly(
    target: PagedRuntime, limit: int, prompt_index: int, prompt: Sequence[int], row: SamplingRow, max_tokens: int
) -> PlainText:
    """``max_tokens`` tokens, ids below ``limit``; the end of text does not end it."""
    sequence, new = target.open(), list(prompt)
    token_ids: list[int] = []
    logits = []
    for position in range(len(prompt), len(prompt) + max_tokens):
        found = target.forward([Chunk(sequence, new, 1)])
        logits.append(found.clone())  # the runtime may use the memory again
        new = draw(found, [row], [position], limit=limit).token_ids
        token_ids += new
    target.free(sequence)
    return PlainText(prompt_index, prompt, row, token_ids, torch.cat(logits))


def guess(draft: PagedRuntime, limit: int, text: PlainText) -> list[int]:
    """The draft's draw at each position of the text, after the target's tokens before it; one pass.

    Ends before the first token that the draft model has no embedding for.
    """
    known = next((i for i, token_id in enumerate(text.token_ids) if token_id >= draft.vocab_size), len(text.token_ids))
    num_rows = min(known + 1, len(text.token_ids))
    fed = [*text.prompt, *text.token_ids[: num_rows - 1]]
    if max(text.prompt) >= draft.vocab_size:
        return []
    sequence = draft.open()
    logits = draft.forward([Chunk(sequence, fed, num_rows)])
    draft.free(sequence)
    positions = range(len(text.prompt), len(text.prompt) + num_rows)
    return draw(logits, [text.row] * num_rows, positions, limit=limit).token_ids


@dataclass(slots=True)
class _Walk:
    """One text on its way through verification."""

    text: PlainText
    sequence: SequenceId
    num_committed: int = 1
    """Tokens of the output. The first comes from the prompt's own pass, in either way of decoding."""

    @property
    def is_over(self) -> bool:
        return self.num_committed >= len(self.text.token_ids)

    def drafts(self, k: int, limit: int) -> list[int]:
        """What the drafter would have proposed; what follows its first miss is rejected whatever it is."""
        stop = min(self.num_committed + k, len(self.text.token_ids) - 1)
        chain = list(self.text.guesses[self.num_committed : stop])
        return chain[: next((i for i, token_id in enumerate(chain) if token_id >= limit), len(chain))]


@dataclass(slots=True)
class Verification:
    """Verifies texts, K drafted tokens of each in one pass."""

    target: PagedRuntime
    limit: int
    rounding: Rounding
    way: str
    k: int
    _num_tokens: int = 0
    _num_steps: int = 0
    _largest_shift: float = 0.0
    _divergences: list[Divergence] = field(default_factory=list)

    def run(self, texts: Sequence[PlainText]) -> None:
        """All of them in each pass, until each has come to its end."""
        walks = [_Walk(text, self.target.open()) for text in texts]
        for walk in walks:
            self.target.forward([Chunk(walk.sequence, list(walk.text.prompt), 0)])
        while running := [walk for walk in walks if not walk.is_over]:
            self._step(running)
        for walk in walks:
            self.target.free(walk.sequence)

    def result(self, temperature: float) -> Verified:
        """Of all runs so far."""
        return Verified(
            self.way, temperature, self._num_tokens, self._num_steps, self._largest_shift, tuple(self._divergences)
        )

    def _step(self, walks: Sequence[_Walk]) -> None:
        chunks = []
        for walk in walks:
            drafts = walk.drafts(self.k, self.limit)
            new = [walk.text.token_ids[walk.num_committed - 1], *drafts]
            chunks.append(Chunk(walk.sequence, new, len(new)))
        logits = self.target.forward(chunks)
        self._num_steps += 1
        start = 0
        for walk, chunk in zip(walks, chunks, strict=True):
            self._conclude(walk, chunk.token_ids[1:], logits[start : start + chunk.num_logits])
            start += chunk.num_logits

    def _conclude(self, walk: _Walk, drafts: Sequence[int], logits: torch.Tensor) -> None:
        text, first = walk.text, walk.num_committed
        positions = range(len(text.prompt) + first, len(text.prompt) + first + len(logits))
        drawn = draw(logits, [text.row] * len(logits), positions, limit=self.limit).token_ids
        for index, token_id in enumerate(drawn):
            plain = text.token_ids[first + index]
            self._compare(text, first + index, token_id, logits[index])
            walk.num_committed += 1
            # Where the two ways part, this one goes on as plain decoding did.
            if index == len(drafts) or drafts[index] != token_id or token_id != plain:
                break
        self.target.truncate(walk.sequence, len(text.prompt) + walk.num_committed - 1)

    def _compare(self, text: PlainText, index: int, token_id: int, logits: torch.Tensor) -> None:
        own = text.logits[index, : self.limit]
        shifts = logits[: self.limit] - own
        self._num_tokens += 1
        self._largest_shift = max(self._largest_shift, float(shifts.abs().max()))
        plain_id = text.token_ids[index]
        if token_id == plain_id:
            return
        plain, verified = (self._score(text, index, one) for one in (plain_id, token_id))
        spread = float(own.std())
        self._divergences.append(
            Divergence(
                way=self.way,
                prompt_index=text.prompt_index,
                position=index,
                temperature=text.row.temperature,
                plain=plain,
                verified=verified,
                spread=spread,
                shift=float(shifts[token_id] - shifts[plain_id]),
                bound=bound_of(self.rounding, spread, plain.logit, verified.logit),
            )
        )

    def _score(self, text: PlainText, index: int, token_id: int) -> TokenScore:
        logit, noise = float(text.logits[index, token_id]), 0.0
        if not text.row.is_greedy:
            ids = torch.tensor([token_id], device=text.logits.device)
            position = len(text.prompt) + index
            noise = text.row.temperature * float(gumbel([text.row.seed], [position], ids)[0, 0])
        return TokenScore(token_id, logit, noise)
