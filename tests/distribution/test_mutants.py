"""Tests of the tests: each known way to get speculative sampling wrong is planted, and the distribution shows it.

Each mutant is a bug that somebody has shipped, or that this code was nearly written with. None of them changes the
acceptance rate in a way that would make anybody look.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from inference import draw, truncated_weights, uniform
from speculation.draft_distribution import WEIGHT_BITS
from speculation.ratio import Decision, DraftedRows, Rule, block, rejection
from target_worker import ratio_verification
from tests.distribution.statistic import FALSE_ALARM_RATE
from tests.distribution.table_world import VOCAB_SIZE, Chain, Ints, TableWorld, positions
from tests.distribution.test_joint_distribution import p_of, world

BOTH = pytest.mark.parametrize("rule", [rejection, block], ids=["rejection", "block"])


def is_caught(rule: Rule, case: str, kind: type[TableWorld] = TableWorld) -> bool:
    return p_of(world(rule, case, kind)) < FALSE_ALARM_RATE


@BOTH
def test_the_first_draft_committed_unverified(rule: Rule) -> None:
    def mutant(rows: DraftedRows) -> Decision:
        right = rule(rows)
        is_forced = (right.num_kept == 0) & (rows.num_drafted > 0)
        num_kept = np.where(is_forced, 1, right.num_kept)
        return Decision(num_kept, np.where(is_forced & (rows.num_drafted == 1), 0.0, right.scales))

    assert is_caught(mutant, "good T=1")


class LosesOwnToken(TableWorld):
    def counts(self, num_kept: Ints, num_drafted: Ints) -> Ints:
        is_partial = (num_kept > 0) & (num_kept < num_drafted)
        return num_kept + ~is_partial


@BOTH
def test_the_own_token_lost_after_a_partial_match(rule: Rule) -> None:
    assert is_caught(rule, "good T=1", LosesOwnToken)


@BOTH
def test_the_residual_subtracts_q_at_the_drafted_token_only(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ratio_verification.draw_residual

    def mutant(
        scores: Tensor, seeds: Sequence[int], starts: Sequence[int], token_ids: Tensor, shares: Tensor
    ) -> list[int]:
        return right(scores, seeds, starts, token_ids, torch.where(shares.isinf(), shares, 0.0))

    monkeypatch.setattr(ratio_verification, "draw_residual", mutant)
    assert is_caught(rule, "good T=1")


class LongestOfTwoBranches(TableWorld):
    def step(
        self, sessions: Ints, contexts: Ints, lengths: Ints, num_drafted: Ints, num_staged: Ints
    ) -> tuple[Ints, Ints]:
        committed, counts = super().step(sessions, contexts, lengths, num_drafted, num_staged)
        rows, seeds = self.rows, self.seeds
        self.seeds = seeds ^ np.uint64(0xABCDEF)  # another branch, with randomness of its own: all else is right
        self.rows = [self.settings.row(int(seed)) for seed in self.seeds]
        others, other_counts = super().step(sessions, contexts, lengths, num_drafted, num_staged)
        self.rows, self.seeds = rows, seeds
        is_longer = other_counts > counts
        return np.where(is_longer[:, None], others, committed), np.where(is_longer, other_counts, counts)


@BOTH
def test_the_longest_of_two_branches(rule: Rule) -> None:
    assert is_caught(rule, "good T=1", LongestOfTwoBranches)


class OneGenerator(TableWorld):
    """Every tenth request has a neighbour's numbers: each alone looks right, together they are too often alike."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.seeds = self.seeds[np.arange(self.num_sessions) // 10 * 10]
        self.rows = [self.settings.row(int(seed)) for seed in self.seeds]


@BOTH
def test_one_generator_shared_by_requests(rule: Rule) -> None:
    assert is_caught(rule, "good T=1", OneGenerator)


class DrawsFromFullQ(TableWorld):
    """Draws from all tokens and sends the best few."""

    def draw_drafts(self, sessions: Ints, contexts: Ints, lengths: Ints, weights: Ints, found: Ints) -> Ints:
        all_ids, all_weights = truncated_weights(self.draft_scores[contexts], VOCAB_SIZE, WEIGHT_BITS)
        return super().draw_drafts(sessions, contexts, lengths, all_weights.numpy(), all_ids.numpy())


class TakesWhatQDoesNotHave(DrawsFromFullQ):
    """And the target takes a token without probability for one of hardly any: p / q is then as good as infinite."""

    def draw_drafts(self, sessions: Ints, contexts: Ints, lengths: Ints, weights: Ints, found: Ints) -> Ints:
        drawn = super().draw_drafts(sessions, contexts, lengths, weights, found)
        is_unknown = ~((found == drawn[:, None]) & (weights > 0)).any(1)
        found[is_unknown, -1], weights[is_unknown, -1] = drawn[is_unknown], 1
        return drawn


@BOTH
def test_drawn_from_full_q_while_truncated_q_is_sent(rule: Rule) -> None:
    assert is_caught(rule, "truncated T=1.5", TakesWhatQDoesNotHave)


@BOTH
def test_that_bug_does_no_harm_where_a_token_without_probability_is_dropped(rule: Rule) -> None:
    """As `VerifierSession` does: the tokens that are left were drawn from the q that was sent, after all."""
    assert not is_caught(rule, "truncated T=1.5", DrawsFromFullQ)


class UnlikelyDraftsComeLate(TableWorld):
    """Whether a draft is there in time depends on what it is."""

    def draft_chain(self, sessions: Ints, contexts: Ints, lengths: Ints, num_staged: Ints) -> Chain:
        chain = super().draft_chain(sessions, contexts, lengths, num_staged)
        is_unlikely = chain.columns > 0
        chain.num_credible[:] = np.where(is_unlikely.any(1), is_unlikely.argmax(1), chain.num_credible)
        return chain


@BOTH
def test_drafts_that_come_late_for_what_they_are(rule: Rule) -> None:
    assert is_caught(rule, "good T=1", UnlikelyDraftsComeLate)


class DraftsWithTargetNoise(TableWorld):
    """Good for the coupled method; a ratio needs drafts that know nothing of what the target will draw."""

    def draw_drafts(self, sessions: Ints, contexts: Ints, lengths: Ints, weights: Ints, found: Ints) -> Ints:
        rows = [self.rows[session] for session in sessions]
        return np.array(draw(self.draft[contexts], rows, positions(lengths)).token_ids)


@BOTH
def test_drafts_drawn_with_the_targets_noise(rule: Rule) -> None:
    assert is_caught(rule, "good T=1", DraftsWithTargetNoise)


class DraftNoiseByPosition(TableWorld):
    def draft_seeds(self, sessions: Ints, contexts: Ints) -> Sequence[int]:
        found: list[int] = self.seeds[sessions].tolist()
        return found


def test_block_redrafts_with_the_noise_of_a_chain_that_it_refused() -> None:
    assert is_caught(block, "bad T=1.5", DraftNoiseByPosition)


def test_block_uses_the_numbers_of_a_position_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_position(seeds: Sequence[int], starts: Sequence[int], num_depths: int, device: torch.device) -> Tensor:
        columns = [
            uniform(seeds, [start + depth for start in starts], torch.zeros(1, dtype=torch.int64), stream=2)
            for depth in range(num_depths)
        ]
        return torch.cat(columns, dim=1)

    monkeypatch.setattr(ratio_verification, "accept_uniforms", by_position)
    assert is_caught(block, "bad T=1.5")


def test_block_draws_the_residual_of_rejection() -> None:
    def mutant(rows: DraftedRows) -> Decision:
        right = block(rows)
        return Decision(right.num_kept, np.where(right.scales > 0, 1.0, 0.0))

    assert is_caught(mutant, "bad T=1.5")
