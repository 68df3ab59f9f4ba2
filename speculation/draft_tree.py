"""Drafted tokens beyond the committed prefix, as a tree addressed by content.

Target and coordinator never agree on node ids or epochs: a proposal names what precedes it by length and fingerprint,
and `DraftTree.graft` finds where it belongs, or drops it. The main line at every node is the child that was proposed
first; other children are branches, which cost nothing until a commit walks into one of them.

Cost: `graft` is O(tokens in the proposal), `commit` O(tokens committed + nodes dropped), memory O(prefix + nodes),
and the number of nodes is bounded, so a hostile drafter can waste neither time nor memory without limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from speculation.draft_distribution import DraftDistribution
from speculation.fingerprint import EMPTY, Fingerprint, extend
from speculation.messages import Proposal, TokenId

MAX_NODES = 1024
"""Nodes one session may stage; far above any useful lookahead."""


@dataclass(slots=True)
class _Node:
    fingerprint: Fingerprint
    length: int
    """Number of tokens up to and including this node's."""
    is_branch: bool = False
    """Came as part of a branch."""
    distribution: DraftDistribution | None = None
    """What the token was drawn from, if that was told."""
    confidence: float | None = None
    """How sure the drafter was of it, if that was told. May be anything: drafters are not trusted."""
    children: dict[TokenId, _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Graft:
    """What became of a proposal's tokens."""

    num_new: int = 0
    """Now held; the others are stale, repeated, without a known parent or beyond the tree's bound."""
    num_late: int = 0
    """Already decided when they came, up to the first that was wrong, which ends the chain."""
    num_late_right: int = 0


class DraftTree:
    """The committed prefix of one session and what is drafted beyond it."""

    def __init__(self, token_ids: Sequence[TokenId], max_nodes: int = MAX_NODES) -> None:
        self._token_ids: list[TokenId] = []
        self._prefixes: list[Fingerprint] = [EMPTY]  # _prefixes[n] is the fingerprint of the first n tokens
        self._root = _Node(EMPTY, 0)
        self._nodes: dict[Fingerprint, _Node] = {}  # without the root
        self._max_nodes = max_nodes
        self.commit(token_ids)

    @property
    def token_ids(self) -> Sequence[TokenId]:
        """The committed tokens; a live view, not to be changed."""
        return self._token_ids

    @property
    def num_nodes(self) -> int:
        """Drafted tokens held, branches included."""
        return len(self._nodes)

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the committed tokens."""
        return self._prefixes[-1]

    def graft(self, proposal: Proposal) -> Graft:
        """Adds the proposal's tokens where they belong, as far as they are of use."""
        if proposal.prefix_length > len(self._token_ids):
            node = self._nodes.get(Fingerprint(proposal.prefix_fingerprint))
            if node is None or node.length != proposal.prefix_length:
                return Graft()
            if proposal.is_branch and not node.children and not node.is_branch:
                return Graft()  # it would be the main line, whose own token has not come
            return Graft(self._grow(node, proposal))
        if self._prefixes[proposal.prefix_length] != proposal.prefix_fingerprint:
            return Graft()
        return self._graft_late(proposal)

    def _graft_late(self, proposal: Proposal) -> Graft:
        """The chain begins at or before the end of what is committed; it lives on as far as it agrees with that."""
        start = proposal.prefix_length
        decided = self._token_ids[start : start + len(proposal.token_ids)]
        num_right = 0
        while num_right < len(decided) and proposal.token_ids[num_right] == decided[num_right]:
            num_right += 1
        num_late = num_right + 1 if num_right < len(decided) else num_right
        num_new = 0
        if num_right == len(decided):  # a branch too: the commit may have gone along it, and what follows is its rest
            num_new = self._grow(self._root, proposal, num_right)
        return Graft(num_new) if proposal.is_branch else Graft(num_new, num_late, num_right)

    def _grow(self, node: _Node, proposal: Proposal, start: int = 0) -> int:
        """Hangs the proposal's tokens from ``start`` on below ``node``."""
        num_new = 0
        for index, token_id in enumerate(proposal.token_ids[start:], start):
            child = node.children.get(token_id)
            if child is None:
                if len(self._nodes) >= self._max_nodes:
                    break
                child = _Node(
                    extend(node.fingerprint, token_id),
                    node.length + 1,
                    proposal.is_branch,
                    proposal.distributions[index] if proposal.distributions else None,
                    proposal.confidences[index] if index < len(proposal.confidences) else None,
                )
                if child.fingerprint in self._nodes:  # a collision: drop rather than confuse two nodes
                    break
                node.children[token_id] = child
                self._nodes[child.fingerprint] = child
                num_new += 1
            node = child
        return num_new

    def commit(self, token_ids: Sequence[TokenId]) -> int:
        """Extends the committed prefix and keeps what agrees with it; returns how many drafted tokens were dropped.

        Tokens that the commit walked over are neither kept nor counted as dropped.
        """
        num_dropped = 0
        node = self._root
        for token_id in token_ids:
            for sibling_id, sibling in node.children.items():
                if sibling_id != token_id:
                    num_dropped += self._drop(sibling)
            child = node.children.get(token_id)
            if child is None:
                child = _Node(extend(node.fingerprint, token_id), node.length + 1)
            else:
                del self._nodes[child.fingerprint]
            self._token_ids.append(token_id)
            self._prefixes.append(child.fingerprint)
            node = child
        self._root = node
        return num_dropped

    def _drop(self, node: _Node) -> int:
        stack, num_dropped = [node], 0
        while stack:
            node = stack.pop()
            del self._nodes[node.fingerprint]
            stack.extend(node.children.values())
            num_dropped += 1
        return num_dropped

    def main_line(self, max_tokens: int) -> list[TokenId]:
        """Up to ``max_tokens`` drafted tokens from the committed prefix down the first-proposed children."""
        return [token_id for token_id, _ in self._main_line(max_tokens)]

    def main_line_distributions(self, max_tokens: int) -> list[DraftDistribution | None]:
        """What the tokens of `main_line` were drawn from."""
        return [node.distribution for _, node in self._main_line(max_tokens)]

    def main_line_confidences(self, max_tokens: int) -> list[float | None]:
        """How sure the drafter said it was of each token of `main_line`, given those before it."""
        return [node.confidence for _, node in self._main_line(max_tokens)]

    def _main_line(self, max_tokens: int) -> list[tuple[TokenId, _Node]]:
        line: list[tuple[TokenId, _Node]] = []
        node = self._root
        while node.children and len(line) < max_tokens:
            line.append(next(iter(node.children.items())))
            node = line[-1][1]
        return line
