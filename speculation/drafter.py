"""The draft worker's side of one session: what to feed the draft model next, and what to propose.

``committed + chain`` is the sequence as the drafter sees it. The draft model's KV holds a prefix of it, the first
``num_cached`` tokens; a commit that disagrees with the chain lowers ``num_cached``, and the engine truncates.
"""

from __future__ import annotations

from collections.abc import Sequence

from speculation.fingerprint import Fingerprint, extend, fingerprint
from speculation.messages import Commit, OpenDraft, Proposal, TokenId

MAX_LOOKAHEAD = 256
"""A greater lookahead is cut to this: one session must not draft for ever."""


class CommitMismatch(ValueError):
    """A commit leaves a gap behind, or contradicts, what is committed already."""


class DrafterSession:
    """One session's committed tokens and the chain drafted beyond them."""

    def __init__(self, command: OpenDraft, vocab_size: int, max_context: int) -> None:
        self.sampling = command.sampling
        self._lookahead = min(command.lookahead, MAX_LOOKAHEAD)
        self.num_cached = 0
        self._vocab_size = vocab_size
        self._max_length = min(command.max_length or max_context, max_context)
        self._committed: list[TokenId] = list(command.token_ids)
        self._fingerprint = fingerprint(command.token_ids)
        self._chain: list[TokenId] = []
        self._confidences: list[float] = []
        self._num_sent = 0  # of the chain

    @property
    def num_committed(self) -> int:
        return len(self._committed)

    @property
    def num_unsent(self) -> int:
        """Drafted tokens that no proposal has carried yet."""
        return len(self._chain) - self._num_sent

    @property
    def num_sent(self) -> int:
        """Drafted tokens beyond the committed ones that proposals have carried."""
        return self._num_sent

    @property
    def num_drafted(self) -> int:
        """Drafted tokens beyond the committed ones."""
        return len(self._chain)

    def set_lookahead(self, lookahead: int) -> None:
        """Draft at most so far ahead. 0 pauses: the chain goes too, as nobody keeps what of it was sent."""
        self._lookahead = min(lookahead, MAX_LOOKAHEAD)
        if lookahead == 0:
            self.num_cached = min(self.num_cached, len(self._committed))
            self._keep_chain_from(len(self._chain))

    def wants_draft(self) -> bool:
        """Is there room below the lookahead and before the end of the sequence?"""
        length = len(self._committed) + len(self._chain)
        return len(self._chain) < self._lookahead and length < self._max_length

    def committed_and_chain(self) -> list[TokenId]:
        """The whole sequence as the drafter sees it."""
        return self._committed + self._chain

    def uncached(self) -> list[TokenId]:
        """Tokens the draft model has to run before it can draw the next one; at least one."""
        if self.num_cached < len(self._committed):
            return self._committed[self.num_cached :] + self._chain
        return self._chain[self.num_cached - len(self._committed) :]

    def drafted(self, token_id: TokenId, confidence: float) -> None:
        """The draft model drew ``token_id`` after all of ``committed + chain``."""
        self._chain.append(token_id)
        self._confidences.append(confidence)

    def commit(self, command: Commit) -> None:
        """Follows the target: what agrees stays drafted, the rest is dropped at once, unsent tokens included.

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

    def _advance(self, token_ids: Sequence[TokenId]) -> None:
        num_agreed = 0
        while num_agreed < min(len(token_ids), len(self._chain)) and token_ids[num_agreed] == self._chain[num_agreed]:
            num_agreed += 1
        if num_agreed < len(token_ids):  # missed, or past the end of the chain: nothing drafted remains
            self.num_cached = min(self.num_cached, len(self._committed) + num_agreed)
            self._keep_chain_from(len(self._chain))
        else:
            self._keep_chain_from(num_agreed)
        for token_id in token_ids:
            self._fingerprint = extend(self._fingerprint, token_id)
        self._committed.extend(token_ids)

    def _keep_chain_from(self, index: int) -> None:
        del self._chain[:index]
        del self._confidences[:index]
        self._num_sent = max(0, self._num_sent - index)

    def take_proposal(self) -> Proposal | None:
        """What has been drafted and not sent yet, as one proposal; None if there is nothing."""
        if not self.num_unsent:
            return None
        prefix = self._fingerprint
        for token_id in self._chain[: self._num_sent]:
            prefix = extend(prefix, token_id)
        proposal = Proposal(
            prefix_length=len(self._committed) + self._num_sent,
            prefix_fingerprint=Fingerprint(prefix),
            token_ids=tuple(self._chain[self._num_sent :]),
            confidences=tuple(self._confidences[self._num_sent :]),
        )
        self._num_sent = len(self._chain)
        return proposal
