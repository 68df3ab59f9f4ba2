"""Keeping drafted tokens by probabilities, for the sessions of a step that ask for it (`speculation.ratio`).

Only what the rule looks at leaves the device: the target's probabilities of the drafter's candidates, some dozens of
numbers per drafted token. Whole rows are touched again only where an own token is drawn, one for each session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inference import SamplingRow, accept_uniforms, draw, draw_residual, probabilities_at, warped
from speculation.draft_distribution import WEIGHT_TOTAL, DraftDistribution
from speculation.messages import Method, TokenId
from speculation.ratio import Decision, DraftedRows, Floats, Integers, Rule, block, decide, rejection

RULES: Mapping[Method, Rule] = {Method.REJECTION: rejection, Method.BLOCK: block}


@dataclass(frozen=True, slots=True)
class Judged:
    """One session of a step: what is staged, and how many of that the step verifies."""

    method: Method
    rows: Sequence[SamplingRow]
    """How each place is drawn, ``num_drafted + 1``."""
    start: int
    """Position of the first staged token."""
    num_drafted: int
    staged: Sequence[tuple[TokenId, DraftDistribution]]
    """The drafted tokens and, if there is one, the token behind them."""


@dataclass(frozen=True, slots=True)
class StagedRows:
    """Staged tokens of S sessions, T together, at most C candidates for each; sessions in order, depths rising."""

    sessions: Integers
    """[T]"""
    depths: Integers
    """[T]"""
    candidates: Tensor
    """int64 [T, C]"""
    q: Floats
    """[T, C]; 0 in the padding."""
    columns: Integers
    """[T]: which candidate was drafted."""
    num_drafted: Integers
    """[S]"""
    seeds: Sequence[int]
    starts: Sequence[int]


def verify_by_ratio(logits: Tensor, sessions: Sequence[Judged], vocab_size: int) -> list[list[TokenId]]:
    """For each session the tokens kept and the own one behind them.

    ``logits``: float32, ``num_drafted + 1`` rows of each session in turn. Each has something staged.
    """
    rows = torch.split_with_sizes(logits, [session.num_drafted + 1 for session in sessions])
    found: dict[int, list[TokenId]] = {}
    for method, rule in RULES.items():
        indices = [index for index, session in enumerate(sessions) if session.method is method]
        if indices:
            alike = [sessions[index] for index in indices]
            found.update(
                zip(indices, _verify(rule, [rows[index] for index in indices], alike, vocab_size), strict=True)
            )
    return [found[index] for index in range(len(sessions))]


def _verify(rule: Rule, logits: Sequence[Tensor], sessions: Sequence[Judged], vocab_size: int) -> list[list[TokenId]]:
    staged_logits = torch.cat([rows[: len(one.staged)] for rows, one in zip(logits, sessions, strict=True)])
    rows = [row for one in sessions for row in one.rows[: len(one.staged)]]
    scores = warped(staged_logits, rows, limit=vocab_size)
    num_kept, own = judge(rule, scores, _staged_rows(sessions, logits[0].device))
    bonus = [index for index, token_id in enumerate(own) if token_id is None]
    if bonus:
        last_rows = torch.stack([logits[index][-1] for index in bonus])
        positions = [sessions[index].start + sessions[index].num_drafted for index in bonus]
        drawn = draw(last_rows, [sessions[index].rows[-1] for index in bonus], positions, limit=vocab_size).token_ids
        for index, token_id in zip(bonus, drawn, strict=True):
            own[index] = token_id
    return [_tokens(*one) for one in zip(sessions, num_kept.tolist(), own, strict=True)]


def _tokens(session: Judged, num_kept: int, own: TokenId | None) -> list[TokenId]:
    assert own is not None
    kept = [token_id for token_id, _ in session.staged[: min(num_kept, session.num_drafted)]]
    return [*kept, own]


def judge(rule: Rule, scores: Tensor, staged: StagedRows) -> tuple[Integers, list[TokenId | None]]:
    """How many staged tokens of each session stay, and its own token; None: to be drawn from p, behind them all.

    ``scores`` are the target's, float32 [T, V]. If the token behind the drafted ones stays, it is the own one.
    """
    p = np.where(staged.q > 0, probabilities_at(scores, staged.candidates).cpu().numpy(), 0.0)
    decision = decide(rule, _drafted_rows(p, staged, scores.device))
    own: list[TokenId | None] = [None] * len(staged.seeds)
    offsets = np.searchsorted(staged.sessions, np.arange(len(own)))
    for session in np.flatnonzero(decision.num_kept > staged.num_drafted).tolist():
        row = offsets[session] + staged.num_drafted[session]
        own[session] = int(staged.candidates[row, staged.columns[row]])
    refused = np.flatnonzero(decision.scales > 0)
    for session, token_id in zip(refused.tolist(), _own_tokens(scores, staged, decision, offsets), strict=True):
        own[session] = token_id
    return decision.num_kept, own


def _drafted_rows(p: Floats, staged: StagedRows, device: torch.device) -> DraftedRows:
    """The rows by session and depth."""
    num_sessions, num_depths = len(staged.seeds), int(staged.depths.max()) + 1
    place = staged.sessions, staged.depths
    by_place = np.zeros((2, num_sessions, num_depths, p.shape[1]))
    by_place[0][place], by_place[1][place] = p, staged.q
    columns = np.zeros((num_sessions, num_depths), dtype=np.int64)
    columns[place] = staged.columns
    return DraftedRows(
        p=by_place[0],
        q=by_place[1],
        columns=columns,
        num_drafted=staged.num_drafted,
        num_rows=np.bincount(staged.sessions, minlength=num_sessions),
        uniforms=accept_uniforms(staged.seeds, staged.starts, num_depths, device).cpu().numpy(),
    )


def _own_tokens(scores: Tensor, staged: StagedRows, decision: Decision, offsets: Integers) -> list[TokenId]:
    """Of the sessions in which a token was refused, drawn from what that leaves over."""
    refused = np.flatnonzero(decision.scales > 0)
    if not len(refused):
        return []
    num_kept = decision.num_kept[refused]
    rows = offsets[refused] + num_kept
    shares = staged.q[rows] / decision.scales[refused, None]
    shares[np.arange(len(rows)), staged.columns[rows]] = np.inf  # zero by the rule; not by rounding either
    seeds = [staged.seeds[index] for index in refused.tolist()]
    starts = [staged.starts[index] for index in refused.tolist()]
    positions = [start + kept for start, kept in zip(starts, num_kept.tolist(), strict=True)]
    chosen = torch.as_tensor(rows, device=scores.device)
    taken = torch.as_tensor(shares, device=scores.device)
    return draw_residual(scores[chosen], seeds, positions, staged.candidates[chosen], taken)


def _staged_rows(sessions: Sequence[Judged], device: torch.device) -> StagedRows:
    staged = [one for session in sessions for one in session.staged]
    num_candidates = max(len(distribution.token_ids) for _, distribution in staged)
    candidates = np.zeros((len(staged), num_candidates), dtype=np.int64)
    q = np.zeros((len(staged), num_candidates))
    for row, (_, distribution) in enumerate(staged):
        candidates[row, : len(distribution.token_ids)] = distribution.token_ids
        q[row, : len(distribution.weights)] = distribution.weights
    lengths = [len(session.staged) for session in sessions]
    return StagedRows(
        sessions=np.repeat(np.arange(len(sessions)), lengths),
        depths=np.concatenate([np.arange(length) for length in lengths]),
        candidates=torch.as_tensor(candidates, device=device),
        q=q / WEIGHT_TOTAL,
        columns=np.array([distribution.token_ids.index(token_id) for token_id, distribution in staged]),
        num_drafted=np.array([session.num_drafted for session in sessions]),
        seeds=[session.rows[0].seed for session in sessions],
        starts=[session.start for session in sessions],
    )
