"""What a drafter may have passed on to the target: nothing malformed, and no more than the target would stage."""

from __future__ import annotations

import pytest

from speculation.draft_distribution import WEIGHT_TOTAL, DraftDistribution
from speculation.draft_tree import MAX_NODES
from speculation.messages import MAX_PROPOSAL_TOKENS, Proposal
from speculation.proposal_gate import ProposalGate

Q = DraftDistribution((3,), (WEIGHT_TOTAL,))


def proposal(num_tokens: int, q: bool = False) -> Proposal:
    return Proposal(5, 77, (3,) * num_tokens, (0.5,) * num_tokens, distributions=(Q,) * num_tokens if q else ())


@pytest.mark.parametrize(("num_tokens", "passes"), [(0, False), (1, True), (256, True), (257, False)])
def test_as_many_tokens_as_a_proposal_may_have(num_tokens: int, passes: bool) -> None:
    assert MAX_PROPOSAL_TOKENS == 256
    assert (ProposalGate(False).let_through(proposal(num_tokens)) is not None) is passes


def test_no_more_between_two_verdicts_than_the_target_would_stage() -> None:
    gate = ProposalGate(False)
    num_passed = sum(gate.let_through(proposal(100)) is not None for _ in range(500))
    assert num_passed * 100 <= MAX_NODES < (num_passed + 1) * 100
    assert gate.let_through(proposal(MAX_NODES - num_passed * 100)) is not None
    assert gate.let_through(proposal(1)) is None
    gate.on_verdict()
    assert gate.let_through(proposal(1)) == proposal(1)


def test_what_tokens_were_drawn_from_passes_where_it_is_looked_at() -> None:
    assert ProposalGate(True).let_through(proposal(2, q=True)) == proposal(2, q=True)
    assert ProposalGate(False).let_through(proposal(2, q=True)) == proposal(2)
