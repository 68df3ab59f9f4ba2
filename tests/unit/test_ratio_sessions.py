"""Sessions whose drafts are kept by p/q: what is staged with a q, what is not, and what the relay and drafter do."""

from __future__ import annotations

import dataclasses

import pytest

from speculation.adaptive_k import FixedK
from speculation.draft_distribution import MAX_DRAFT_TOP_N, WEIGHT_TOTAL, DraftDistribution, one_hot
from speculation.drafter import DrafterSession
from speculation.experience import Experience
from speculation.fingerprint import fingerprint
from speculation.guesses import guess_from, guess_of
from speculation.messages import Method, OpenDraft, OpenTarget, Proposal, Sampling, SessionErrorCode
from speculation.relay import RelaySession, ToDraft
from speculation.validation import check_open_target
from speculation.verifier import VerifierSession

REJECTION = Sampling(1.0, seed=5, method=Method.REJECTION, draft_top_n=4)
BRANCHES = 4
VOCAB_SIZE = 50


def session(sampling: Sampling = REJECTION) -> VerifierSession:
    command = OpenTarget((1,), sampling, 100, (9,), 8)
    return VerifierSession(command, VOCAB_SIZE, Experience(lookups=None))


def q(*pairs: tuple[int, int]) -> DraftDistribution:
    return DraftDistribution(tuple(token for token, _ in pairs), tuple(weight for _, weight in pairs))


GOOD = q((2, WEIGHT_TOTAL - 100), (3, 60), (4, 40))


def propose(target: VerifierSession, tokens: list[int], *distributions: DraftDistribution, branch: bool = False) -> int:
    """How many tokens are staged afterwards."""
    prefix = list(target.token_ids)
    proposal = Proposal(len(prefix), fingerprint(prefix), tuple(tokens), (1.0,) * len(tokens), branch, distributions)
    target.stage(proposal, 0.0)
    return len(target.drafted(8))


def test_a_token_is_staged_with_what_it_was_drawn_from() -> None:
    target = session()
    assert propose(target, [3, 7], GOOD, one_hot(7)) == 2
    assert target.staged_behind([3]) == [(3, GOOD), (7, one_hot(7))]
    assert target.staged_behind([]) == [(3, GOOD)]


HOSTILE = {
    "none at all": (),
    "fewer than tokens": (GOOD,),
    "too much": (q((2, WEIGHT_TOTAL), (3, 1)), one_hot(7)),
    "too little": (q((2, WEIGHT_TOTAL - 1)), one_hot(7)),
    "a weight of nothing": (q((2, WEIGHT_TOTAL), (3, 0)), one_hot(7)),
    "more than everything against less than nothing": (q((2, WEIGHT_TOTAL + 5), (3, -5)), one_hot(7)),
    "the token is not in it": (q((4, WEIGHT_TOTAL)), one_hot(7)),
    "a token twice": (q((2, WEIGHT_TOTAL // 2), (2, WEIGHT_TOTAL // 2)), one_hot(7)),
    "too many tokens": (q((2, WEIGHT_TOTAL - 4), (3, 1), (4, 1), (5, 1), (6, 1)), one_hot(7)),
    "outside the vocabulary": (q((2, WEIGHT_TOTAL - 1), (VOCAB_SIZE, 1)), one_hot(7)),
    "fewer weights than tokens": (DraftDistribution((2, 3), (WEIGHT_TOTAL,)), one_hot(7)),
    "nothing in it": (DraftDistribution((), ()), one_hot(7)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_q_is_dropped_and_counted(name: str) -> None:
    target = session()
    num_staged = propose(target, [2, 7], *HOSTILE[name])
    assert num_staged == (1 if name == "fewer than tokens" else 0)
    assert target.conclude([], [5], 0.0).num_dropped >= 1


def test_what_comes_before_a_bad_q_stays_whatever_follows_it() -> None:
    target = session()
    assert propose(target, [2, 7, 8], GOOD, q((7, 5)), one_hot(8)) == 1


def test_without_a_q_only_what_the_drafter_takes_greedily_by_agreement() -> None:
    greedy = dataclasses.replace(REJECTION, draft_top_n=1)
    target = session(greedy)
    assert propose(target, [2, 7]) == 2
    assert target.staged_behind([2]) == [(2, one_hot(2)), (7, one_hot(7))]
    assert propose(session(greedy), [2], GOOD) == 0


def test_branches_are_dropped() -> None:
    target = session()
    propose(target, [2], GOOD)
    assert propose(target, [3], GOOD, branch=True) == 1
    assert target.conclude([2], [3], 0.0).caught is False


def test_at_temperature_0_no_q_is_asked_for() -> None:
    assert not dataclasses.replace(REJECTION, temperature=0.0).by_ratio
    assert propose(session(dataclasses.replace(REJECTION, temperature=0.0)), [2, 7]) == 2


def test_late_drafts_are_no_evidence_since_they_were_not_judged() -> None:
    target = session()
    before = fingerprint([1])
    target.conclude([], [2], 0.0)
    target.stage(Proposal(1, before, (8,), (1.0,), distributions=(one_hot(8),)), 0.0)
    assert target.conclude([], [4], 0.0).num_late == 0


@pytest.mark.parametrize("top_n", [0, MAX_DRAFT_TOP_N + 1])
def test_a_worker_refuses_a_length_of_q_out_of_range(top_n: int) -> None:
    command = OpenTarget((1,), dataclasses.replace(REJECTION, draft_top_n=top_n), 9, (), 1)
    error = check_open_target(command, VOCAB_SIZE, 100)
    assert error is not None
    assert "draft_top_n" in error.message


def test_a_worker_refuses_a_method_that_it_does_not_know() -> None:
    command = OpenTarget((1,), Sampling(method=Method.UNKNOWN), 9, (), 1)
    error = check_open_target(command, VOCAB_SIZE, 100)
    assert error is not None
    assert error.code is SessionErrorCode.INVALID


def test_the_drafter_sends_q_with_its_tokens_and_no_branches() -> None:
    drafter = DrafterSession(OpenDraft((1,), REJECTION, 8, 100, BRANCHES), VOCAB_SIZE, 100)
    assert not drafter.may_branch
    drafter.drafted(drafter.main, guess_from(3, GOOD))
    drafter.drafted(drafter.main, guess_from(7, one_hot(7)))
    [proposal] = drafter.take_proposals(1)
    assert (proposal.token_ids, proposal.distributions) == ((3, 7), (GOOD, one_hot(7)))
    drafter.drafted(drafter.main, guess_from(2, GOOD))
    [proposal] = drafter.take_proposals(1)
    assert (proposal.token_ids, proposal.distributions) == ((2,), (GOOD,))


def test_the_drafter_believes_as_much_of_a_guess_whichever_token_it_is() -> None:
    drafter = DrafterSession(OpenDraft((1,), REJECTION, 8, 100), VOCAB_SIZE, 100)
    for token in (2, 3, 4):
        drafter.drafted(drafter.main, guess_from(token, GOOD))
    assert len(set(drafter.main.chances)) == 1


def test_coupled_proposals_carry_no_q() -> None:
    drafter = DrafterSession(OpenDraft((1,), Sampling(1.0), 8, 100, BRANCHES), VOCAB_SIZE, 100)
    drafter.drafted(drafter.main, guess_of(3, [(4, 0.5)]))
    [proposal, *_] = drafter.take_proposals(1)
    assert proposal.distributions == ()


def test_the_relay_passes_q_on_asks_for_no_branches_and_counts_its_bytes() -> None:
    relay = RelaySession((1,), REJECTION, 50, (9,), FixedK(4), 20, max_branches=BRANCHES)
    relay.on_target_up(0.0)
    [opening] = [action.command for action in relay.on_draft_up(0.0) if isinstance(action, ToDraft)]
    assert isinstance(opening, OpenDraft)
    assert (opening.sampling, opening.max_branches) == (REJECTION, 0)
    proposal = Proposal(1, fingerprint([1]), (3,), (1.0,), distributions=(GOOD,))
    [sent] = relay.on_draft_event(proposal, 0.0)
    assert sent.command == proposal  # type: ignore[union-attr]
    assert relay.stats.q_bytes_received == relay.stats.q_bytes_relayed == GOOD.num_bytes == 3 + 3 + 1 + 1
