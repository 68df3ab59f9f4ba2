"""Both engines, their sessions, schedules and caches, on table models: what comes out has the target's distribution.

`test_joint_distribution` says that the arithmetic is right, with samples enough; here is everything around the
arithmetic: proposals, staging, K that changes, drafts that come late, stop tokens, rollback. That takes longer, so the
usual run has fewer sessions; ``pytest -m slow tests/distribution`` has as many as there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from draft_worker.engine import DraftEngine
from inference import Runtime
from rpc.engine_host import ConnectionId, Submitted
from speculation.messages import (
    Commit,
    DraftCommand,
    FinishReason,
    Method,
    OpenDraft,
    OpenTarget,
    Proposal,
    Sampling,
    SessionId,
    SetK,
    TargetCommand,
    Verdict,
)
from speculation.verifier import VerifierSession
from target_worker.engine import VerifyEngine
from target_worker.sessions import TargetSession
from tests.distribution.statistic import FALSE_ALARM_RATE, NUM_SAMPLES, p_value
from tests.distribution.table_runtime import TableRuntime
from tests.distribution.table_world import NUM_TOKENS, VOCAB_SIZE, Ints, Settings, cells, exact_joint
from tests.distribution.test_joint_distribution import DRAFTS, TARGET

NUM_SESSIONS = 8_000
NUM_TOGETHER = 400
STOP = 0
HERE = ConnectionId(1)
PROMPT = (1,)


class Run:
    """A batch of sessions from the first token to the last, each frame of drafts late as chance will have it."""

    def __init__(self, sampling: Sequence[Sampling], seed: int) -> None:
        ticks = itertools.count(0.0, 0.001).__next__
        self.target = VerifyEngine(TableRuntime(TARGET), VOCAB_SIZE, 4096, clock=ticks)
        self.draft = DraftEngine(TableRuntime(DRAFTS["good"]), VOCAB_SIZE, 4096, flush_tokens=2, clock=ticks)
        self.chance = np.random.default_rng(seed)
        self.tokens: list[list[int]] = [[] for _ in sampling]
        self.late: list[tuple[SessionId, Proposal]] = []
        self.num_drafted = self.num_accepted = 0
        max_length = len(PROMPT) + NUM_TOKENS
        ids = [SessionId(index) for index in range(len(sampling))]
        openings = [OpenTarget(PROMPT, one, max_length, (STOP,), 2) for one in sampling]
        self.to_target(list(zip(ids, openings, strict=True)))
        drafting = [OpenDraft(PROMPT, one, 3, max_length) for one in sampling]
        self.to_draft(list(zip(ids, drafting, strict=True)))
        self.open = set(ids)

    def to_target(self, items: Sequence[tuple[SessionId, TargetCommand]]) -> None:
        self.target.apply([Submitted(HERE, items, 0.0)])

    def to_draft(self, items: Sequence[tuple[SessionId, DraftCommand]]) -> None:
        self.draft.apply([Submitted(HERE, items, 0.0)])

    def run(self) -> None:
        for _ in range(200):
            if not self.open:
                return
            self.draft_some()
            self.verify()
        raise AssertionError("sessions do not come to an end")

    def draft_some(self) -> None:
        for _ in range(int(self.chance.integers(0, 3))):
            for _, items in self.draft.step().outputs:
                self.late += [(id_, event) for id_, event in items if isinstance(event, Proposal)]
        arrives = self.chance.random(len(self.late)) < 0.7
        arrived = [one for one, comes in zip(self.late, arrives, strict=True) if comes and one[0] in self.open]
        self.late = [one for one, comes in zip(self.late, arrives, strict=True) if not comes]
        ks: list[tuple[SessionId, TargetCommand]] = [
            (id_, SetK(int(self.chance.integers(0, 4)))) for id_ in sorted(self.open)
        ]
        self.to_target([*arrived, *ks])

    def verify(self) -> None:
        for _, frame in self.target.step().outputs:
            for session_id, event in frame.items:
                assert isinstance(event, Verdict), event
                self.tokens[session_id] += event.token_ids
                self.num_drafted += event.num_drafted
                self.num_accepted += event.num_accepted
                if event.finish_reason is None:
                    self.to_draft([(session_id, Commit(event.start, event.token_ids))])
                else:
                    self.open.discard(session_id)


def sampled(method: Method, settings: Settings, sessions: range) -> list[Sampling]:
    """Every third session is a coupled one, so that the methods share steps."""
    return [
        Sampling(
            settings.temperature,
            settings.top_k,
            settings.top_p,
            seed=7919 * session + 13,
            method=Method.COUPLED if session % 3 == 0 else method,
            draft_top_n=settings.top_n,
        )
        for session in sessions
    ]


def joint_with_stop(settings: Settings) -> np.ndarray:
    """As `exact_joint`, with nothing behind a stop token but stop tokens."""
    continuations = np.array(list(itertools.product(range(VOCAB_SIZE), repeat=NUM_TOKENS)))
    return np.bincount(cells(cut(continuations)), weights=exact_joint(TARGET, settings), minlength=len(continuations))


def cut(tokens: Ints) -> Ints:
    is_behind = (np.cumsum(tokens == STOP, axis=1) - (tokens == STOP)) > 0
    return np.where(is_behind, STOP, tokens)


def p_of(method: Method, settings: Settings, num_sessions: int = NUM_SESSIONS) -> float:
    tokens: list[list[int]] = []
    num_drafted = num_accepted = 0
    for start in range(0, num_sessions, NUM_TOGETHER):
        run = Run(sampled(method, settings, range(start, start + NUM_TOGETHER)), seed=start)
        run.run()
        tokens += run.tokens
        num_drafted += run.num_drafted
        num_accepted += run.num_accepted
    assert 0 < num_accepted < num_drafted
    padded = np.array([(one + [STOP] * NUM_TOKENS)[:NUM_TOKENS] for one in tokens])
    counts = np.bincount(cells(padded), minlength=VOCAB_SIZE**NUM_TOKENS)
    return p_value(counts, joint_with_stop(settings))


SETTINGS = Settings(1.0, top_n=3)
METHODS = pytest.mark.parametrize("method", [Method.REJECTION, Method.BLOCK], ids=["rejection", "block"])


DRAWN = pytest.mark.parametrize(
    "settings", [SETTINGS, Settings(1.5, top_p=0.9, top_n=1)], ids=["sampled", "greedy draft"]
)


@METHODS
@DRAWN
def test_what_the_engines_commit(method: Method, settings: Settings) -> None:
    assert p_of(method, settings) > FALSE_ALARM_RATE


@pytest.mark.slow
@pytest.mark.timeout(1800)
@METHODS
@DRAWN
def test_what_the_engines_commit_in_many_sessions(method: Method, settings: Settings) -> None:
    p = p_of(method, settings, NUM_SAMPLES)
    print(f"\n{NUM_SAMPLES} sessions: p {p:.3f}")
    assert p > FALSE_ALARM_RATE


@METHODS
def test_the_mutant_that_does_not_cut_behind_an_accepted_stop_token(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = VerifierSession._cut_at_end

    def mutant(
        self: VerifierSession, token_ids: Sequence[int], start: int
    ) -> tuple[tuple[int, ...], FinishReason | None]:
        _, reason = right(self, token_ids, start)
        return tuple(token_ids), reason

    monkeypatch.setattr(VerifierSession, "_cut_at_end", mutant)
    assert p_of(method, SETTINGS) < FALSE_ALARM_RATE


@METHODS
def test_the_mutant_that_keeps_refused_tokens_in_the_cache(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sharing a block before its tokens were accepted comes to."""

    def mutant(self: TargetSession, runtime: Runtime) -> None:
        self.forget_uncommitted()

    monkeypatch.setattr(TargetSession, "roll_back", mutant)
    assert p_of(method, Settings(0.5, top_n=3)) < FALSE_ALARM_RATE


@METHODS
def test_a_seed_and_the_same_drafts_give_the_same_tokens(method: Method) -> None:
    runs = [Run(sampled(method, SETTINGS, range(50)), seed=3) for _ in range(2)]
    for run in runs:
        run.run()
    assert runs[0].tokens == runs[1].tokens


@METHODS
def test_without_drafts_the_tokens_are_those_of_plain_decoding(method: Method) -> None:
    tokens = []
    for way in (method, Method.COUPLED):
        run = Run(sampled(way, SETTINGS, range(50)), seed=3)
        run.draft_some = lambda: None  # type: ignore[method-assign]
        run.run()
        tokens.append(run.tokens)
    assert tokens[0] == tokens[1]
