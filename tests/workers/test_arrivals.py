"""What arrives while a verify step runs counts before its verdicts leave, and never for the tokens they tell."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from transformers import LlamaForCausalLM

from inference import PagedRuntime
from rpc.engine_host import ConnectionId, Hangup, Submitted
from speculation.fingerprint import fingerprint
from speculation.messages import (
    CloseSession,
    OpenTarget,
    Proposal,
    Sampling,
    SessionId,
    TargetCommand,
    TargetFrame,
    Verdict,
)
from target_worker.engine import EngineCommand, VerifyEngine
from tests.doubles import reference
from tests.doubles.tiny_models import VOCAB_SIZE

MakeRuntime = Callable[..., PagedRuntime]
CONNECTION = ConnectionId(1)
ONE, TWO = SessionId(1), SessionId(2)
PROMPT = [3, 1, 4, 1, 5]


def said(session_id: SessionId, *commands: TargetCommand) -> EngineCommand:
    return Submitted(CONNECTION, [(session_id, command) for command in commands], 0.0)


def opening(max_tokens: int = 12) -> OpenTarget:
    return OpenTarget(tuple(PROMPT), Sampling(), len(PROMPT) + max_tokens, (), 4)


def drafts(prefix: Sequence[int], tokens: Sequence[int], is_branch: bool = False) -> Proposal:
    confidences = (1.0,) * len(tokens)
    return Proposal(len(prefix), fingerprint(prefix), tuple(tokens), confidences, is_branch=is_branch)


class Target:
    """An engine, and its frames."""

    def __init__(self, make_runtime: MakeRuntime) -> None:
        self.runtime = make_runtime()
        # a clock on which every step takes as long as any other, so that the planner trims nothing
        self.engine = VerifyEngine(self.runtime, VOCAB_SIZE, 64, clock=itertools.count(0.0, 0.01).__next__)
        self.tokens: dict[SessionId, list[int]] = {ONE: [], TWO: []}

    def step(self, *arrived: EngineCommand) -> list[TargetFrame]:
        """One step, during which ``arrived`` comes."""
        frames = [frame for _, frame in self.engine.step(lambda: arrived).outputs]
        for frame in frames:
            for session_id, event in frame.items:
                if isinstance(event, Verdict):
                    self.tokens[session_id].extend(event.token_ids)
        return frames


@pytest.fixture
def answer(target_model: LlamaForCausalLM) -> list[int]:
    return reference.decode(target_model, PROMPT, reference.Parameters(), 12)


def verdict_of(frames: Sequence[TargetFrame]) -> Verdict:
    [frame] = frames
    [(_, event)] = frame.items
    assert isinstance(event, Verdict)
    return event


def test_a_branch_that_comes_during_the_step_that_misses_has_caught_it(
    make_runtime: MakeRuntime, answer: list[int]
) -> None:
    target = Target(make_runtime)
    target.engine.apply([said(ONE, opening())])
    target.step()
    known = [*PROMPT, answer[0]]
    wrong = (answer[1] + 1) % VOCAB_SIZE
    target.engine.apply([said(ONE, drafts(known, [wrong, 7]))])
    verdict = verdict_of(target.step(said(ONE, drafts(known, answer[1:4], is_branch=True))))
    assert (verdict.missed, verdict.caught, verdict.num_staged) == (True, True, 2)
    assert verdict_of(target.step()).num_accepted == 2
    assert target.tokens[ONE] == answer[:5]


def test_who_leaves_during_a_step_is_gone_after_it(make_runtime: MakeRuntime) -> None:
    target = Target(make_runtime)
    free = target.runtime.num_free_tokens
    target.engine.apply([said(ONE, opening()), said(TWO, opening())])
    [frame] = target.step(said(ONE, CloseSession()))
    assert {session_id for session_id, _ in frame.items} == {ONE, TWO}  # it had been said already
    assert {session_id for [frame] in [target.step()] for session_id, _ in frame.items} == {TWO}
    assert target.step(Hangup(CONNECTION)) == []
    assert target.engine.step().wait_s is None
    assert target.runtime.num_free_tokens == free


def test_who_begins_during_a_step_is_in_the_next(make_runtime: MakeRuntime, answer: list[int]) -> None:
    target = Target(make_runtime)
    target.engine.apply([said(ONE, opening(1))])
    target.step(said(TWO, opening()))  # the first one ends with this step
    while len(target.tokens[TWO]) < 12:
        assert target.step()
    assert target.tokens == {ONE: answer[:1], TWO: answer}
