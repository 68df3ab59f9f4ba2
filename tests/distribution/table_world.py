"""Speculative decoding of very many sessions at once, on models that are tables, by the functions that workers use.

A table model has one row of logits for each prefix, so the distribution of continuations can be written down exactly.
Here stand what links, queues and sessions do in production: which drafts are there when a step comes (K and a token
more, at random, never the same twice) and what is committed. Everything that draws or decides is production code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference import SamplingRow, draw, pick, truncated_weights, warped
from speculation.draft_distribution import WEIGHT_BITS, WEIGHT_TOTAL
from speculation.fingerprint import fingerprint
from speculation.ratio import Rule
from target_worker import ratio_verification
from target_worker.ratio_verification import StagedRows

VOCAB_SIZE = 5
NUM_TOKENS = 3
"""Of each continuation."""
MAX_K = 3
PROMPT_LENGTH = 7
"""Positions of the output begin there; the prompt itself is the same for all."""

_MAX_DEPTH = NUM_TOKENS + MAX_K
NUM_CONTEXTS = sum(VOCAB_SIZE**depth for depth in range(_MAX_DEPTH + 1))

Ints = npt.NDArray[np.int64]


def following(contexts: Ints, tokens: Ints) -> Ints:
    """Prefixes are numbered as nodes of a heap: 0 is the prompt."""
    return contexts * VOCAB_SIZE + 1 + tokens


def table(seed: int, spread: float) -> Tensor:
    """A model: float32 logits [NUM_CONTEXTS, VOCAB_SIZE]."""
    return torch.randn(NUM_CONTEXTS, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * spread


def context_fingerprints() -> npt.NDArray[np.uint64]:
    prefixes = itertools.chain.from_iterable(
        itertools.product(range(VOCAB_SIZE), repeat=depth) for depth in range(_MAX_DEPTH + 1)
    )
    return np.array([fingerprint(prefix) for prefix in prefixes], dtype=np.uint64)


FINGERPRINTS = context_fingerprints()


@dataclass(frozen=True)
class Settings:
    """What all sessions of one run ask for."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    top_n: int = VOCAB_SIZE

    def row(self, seed: int) -> SamplingRow:
        return SamplingRow(self.temperature, self.top_k, self.top_p, seed)


def exact_joint(target: Tensor, settings: Settings) -> npt.NDArray[np.float64]:
    """The probability of each continuation of `NUM_TOKENS` tokens, in the order of `cells`."""
    # By hand and not by production code: softmax, then the most likely tokens until their mass reaches top-p.
    scores = target.double().numpy() / settings.temperature
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    if settings.top_k:
        p = np.where(p >= np.sort(p, axis=1)[:, -settings.top_k][:, None], p, 0.0)
    p /= p.sum(axis=1, keepdims=True)
    order = np.argsort(-p, axis=1)
    ordered = np.take_along_axis(p, order, axis=1)
    kept = np.where(ordered.cumsum(axis=1) - ordered < settings.top_p, ordered, 0.0)
    np.put_along_axis(p, order, kept / kept.sum(axis=1, keepdims=True), axis=1)
    joint, contexts = np.ones(1), np.zeros(1, dtype=np.int64)
    for _ in range(NUM_TOKENS):
        joint = (joint[:, None] * p[contexts]).reshape(-1)
        contexts = following(contexts[:, None], np.arange(VOCAB_SIZE)[None]).reshape(-1)
    return joint


def cells(tokens: Ints) -> Ints:
    """The number of each continuation, [S] of [S, NUM_TOKENS]."""
    return tokens @ (VOCAB_SIZE ** np.arange(NUM_TOKENS)[::-1])


def session_seeds(num_sessions: int) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(11).integers(0, 2**63, num_sessions).astype(np.uint64)


@lru_cache(2)
def session_rows(settings: Settings, num_sessions: int) -> list[SamplingRow]:
    """Kept, as one test after the other has the same settings, and making them takes a quarter of its time."""
    return [settings.row(seed) for seed in session_seeds(num_sessions).tolist()]


class TableWorld:
    """Sessions ``0 .. num_sessions``; each runs until it has `NUM_TOKENS` tokens."""

    def __init__(self, rule: Rule, target: Tensor, draft: Tensor, settings: Settings, num_sessions: int) -> None:
        self.rule, self.target, self.draft, self.settings = rule, target, draft, settings
        self.num_sessions = num_sessions
        self.seeds = session_seeds(num_sessions)
        self.rows = session_rows(settings, num_sessions)
        alike = [settings.row(0)] * NUM_CONTEXTS
        self.target_scores, self.draft_scores = warped(target, alike), warped(draft, alike)
        found, weights = truncated_weights(self.draft_scores, settings.top_n, WEIGHT_BITS)
        self.candidates, self.weights = found.numpy(), weights.numpy()
        self.num_drafted = self.num_kept = 0

    def run(self) -> Ints:
        """[S, NUM_TOKENS]"""
        chances = np.random.default_rng(12)
        tokens = np.full((self.num_sessions, _MAX_DEPTH + 1), -1, dtype=np.int64)
        lengths, contexts = (np.zeros(self.num_sessions, dtype=np.int64) for _ in range(2))
        while len(active := np.flatnonzero(lengths < NUM_TOKENS)):
            num_drafted = chances.integers(0, MAX_K + 1, len(active))
            num_drafted = np.minimum(num_drafted, _MAX_DEPTH - 1 - lengths[active])
            num_staged = num_drafted + chances.integers(0, 2, len(active))
            committed, counts = self.step(active, contexts[active], lengths[active], num_drafted, num_staged)
            for depth in range(committed.shape[1]):
                takes = active[counts > depth]
                column = committed[counts > depth, depth]
                tokens[takes, lengths[takes]] = column
                contexts[takes] = following(contexts[takes], column)
                lengths[takes] += 1
        return tokens[:, :NUM_TOKENS]

    # -- one step -----------------------------------------------------------------------------------------------

    def step(
        self, sessions: Ints, contexts: Ints, lengths: Ints, num_drafted: Ints, num_staged: Ints
    ) -> tuple[Ints, Ints]:
        """Committed tokens [A, D] of the active sessions, and how many each has."""
        chain = self.draft_chain(sessions, contexts, lengths, num_staged)
        num_staged = np.minimum(num_staged, chain.num_credible)
        return self.verify(sessions, contexts, lengths, np.minimum(num_drafted, num_staged), num_staged, chain)

    def draft_chain(self, sessions: Ints, contexts: Ints, lengths: Ints, num_staged: Ints) -> Chain:
        chain = Chain.empty(len(sessions), MAX_K + 1, min(self.settings.top_n, VOCAB_SIZE))
        chain.contexts[:, 0] = contexts
        chain.num_credible[:] = MAX_K + 1
        for depth in range(int(num_staged.max(initial=0))):
            here = np.flatnonzero(num_staged > depth)
            found, weights = self.candidates[chain.contexts[here, depth]], self.weights[chain.contexts[here, depth]]
            drawn = self.draw_drafts(sessions[here], chain.contexts[here, depth], lengths[here] + depth, weights, found)
            is_known = (found == drawn[:, None]) & (weights > 0)
            chain.num_credible[here] = np.where(is_known.any(1), chain.num_credible[here], depth).clip(
                max=chain.num_credible[here]
            )
            chain.candidates[here, depth], chain.weights[here, depth] = found, weights
            chain.columns[here, depth], chain.tokens[here, depth] = is_known.argmax(1), drawn
            chain.contexts[here, depth + 1] = following(chain.contexts[here, depth], drawn)
        return chain

    def draw_drafts(self, sessions: Ints, contexts: Ints, lengths: Ints, weights: Ints, found: Ints) -> Ints:
        columns = pick(torch.as_tensor(weights), self.draft_seeds(sessions, contexts), positions(lengths), WEIGHT_BITS)
        return np.take_along_axis(found, columns.numpy()[:, None], axis=1)[:, 0]

    def draft_seeds(self, sessions: Ints, contexts: Ints) -> Sequence[int]:
        return (self.seeds[sessions] ^ FINGERPRINTS[contexts]).tolist()

    def verify(
        self, sessions: Ints, contexts: Ints, lengths: Ints, num_drafted: Ints, num_staged: Ints, chain: Chain
    ) -> tuple[Ints, Ints]:
        committed = np.zeros((len(sessions), MAX_K + 2), dtype=np.int64)
        committed[:, :-1] = chain.tokens
        num_kept, own = np.zeros(len(sessions), dtype=np.int64), np.full(len(sessions), -1)
        has_staged = np.flatnonzero(num_staged)
        if len(has_staged):
            kept, drawn = self.judge(has_staged, sessions, lengths, num_drafted, num_staged, chain)
            num_kept[has_staged] = np.minimum(kept, num_drafted[has_staged])
            own[has_staged] = [-1 if token is None else token for token in drawn]
        plain = np.flatnonzero(own < 0)
        rows = [self.rows[session] for session in sessions[plain]]
        last = self.target[chain.contexts[plain, num_drafted[plain]]]
        own[plain] = draw(last, rows, positions(lengths[plain] + num_drafted[plain])).token_ids
        committed[np.arange(len(sessions)), num_kept] = own
        self.num_drafted += int(num_drafted.sum())
        self.num_kept += int(num_kept.sum())
        return committed, self.counts(num_kept, num_drafted)

    def counts(self, num_kept: Ints, num_drafted: Ints) -> Ints:
        """How many tokens are committed: those kept and the own one."""
        return num_kept + 1

    def judge(
        self, chosen: Ints, sessions: Ints, lengths: Ints, num_drafted: Ints, num_staged: Ints, chain: Chain
    ) -> tuple[Ints, list[int | None]]:
        counts = num_staged[chosen]
        depths = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        rows = np.repeat(chosen, counts), depths
        staged = StagedRows(
            sessions=np.repeat(np.arange(len(chosen)), counts),
            depths=depths,
            candidates=torch.as_tensor(chain.candidates[rows]),
            q=chain.weights[rows] / WEIGHT_TOTAL,
            columns=chain.columns[rows],
            num_drafted=num_drafted[chosen],
            seeds=[self.rows[session].seed for session in sessions[chosen]],
            starts=positions(lengths[chosen]),
        )
        return ratio_verification.judge(self.rule, self.target_scores[chain.contexts[rows]], staged)


@dataclass(frozen=True)
class Chain:
    """Drafted tokens of A sessions, at most D each, of C candidates."""

    contexts: Ints
    """[A, D + 1]: before each token."""
    tokens: Ints
    """[A, D]"""
    candidates: Ints
    """[A, D, C]"""
    weights: Ints
    """[A, D, C]"""
    columns: Ints
    """[A, D]"""
    num_credible: Ints
    """[A]: tokens before the first that cannot come from its candidates; always all, if there is no bug."""

    @staticmethod
    def empty(num_sessions: int, depth: int, width: int) -> Chain:
        def zeros(*shape: int) -> Ints:
            return np.zeros((num_sessions, *shape), dtype=np.int64)

        return Chain(zeros(depth + 1), zeros(depth), zeros(depth, width), zeros(depth, width), zeros(depth), zeros())


def positions(lengths: Ints) -> list[int]:
    found: list[int] = (PROMPT_LENGTH + lengths).tolist()
    return found


class CoupledWorld(TableWorld):
    """The same with drafts drawn with the target's noise, kept while they equal its draws."""

    def draw_drafts(self, sessions: Ints, contexts: Ints, lengths: Ints, weights: Ints, found: Ints) -> Ints:
        rows = [self.rows[session] for session in sessions]
        return np.array(draw(self.draft[contexts], rows, positions(lengths)).token_ids)

    def judge(
        self, chosen: Ints, sessions: Ints, lengths: Ints, num_drafted: Ints, num_staged: Ints, chain: Chain
    ) -> tuple[Ints, list[int | None]]:
        rows = [self.rows[session] for session in sessions[chosen]]
        num_kept, own = np.zeros(len(chosen), dtype=np.int64), np.full(len(chosen), -1)
        for depth in range(MAX_K + 1):
            asked = np.flatnonzero((num_drafted[chosen] >= depth) & (num_kept == depth) & (own < 0))
            if not len(asked):
                break
            logits = self.target[chain.contexts[chosen[asked], depth]]
            drawn = np.array(
                draw(logits, [rows[i] for i in asked], positions(lengths[chosen[asked]] + depth)).token_ids
            )
            is_right = (drawn == chain.tokens[chosen[asked], min(depth, MAX_K)]) & (num_drafted[chosen[asked]] > depth)
            num_kept[asked] += is_right
            own[asked] = np.where(is_right, -1, drawn)
        return num_kept, [int(token) for token in own]
