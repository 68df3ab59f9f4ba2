"""What of a drafter's proposals is passed on to the target.

A drafter may send anything, and as much of it as its link carries. What the target would have no use for in any case
stops here: it cannot fill the target's frames, nor the time of those that share them.
"""

from __future__ import annotations

from speculation.draft_tree import MAX_NODES
from speculation.messages import MAX_PROPOSAL_TOKENS, Proposal


class ProposalGate:
    """Of one session."""

    def __init__(self, by_ratio: bool) -> None:
        """``by_ratio``: the target looks at what tokens were drawn from."""
        self._by_ratio = by_ratio
        self._num_left = MAX_NODES

    def on_verdict(self) -> None:
        """The target has decided something, so it may have room again."""
        self._num_left = MAX_NODES

    def let_through(self, proposal: Proposal) -> Proposal | None:
        """The proposal with what of it is of use; None: nothing is.

        Between two verdicts no more tokens pass than the target would stage of a session that had none.
        """
        if not 0 < len(proposal.token_ids) <= min(MAX_PROPOSAL_TOKENS, self._num_left):
            return None
        self._num_left -= len(proposal.token_ids)
        return proposal if self._by_ratio else proposal.without_distributions()
