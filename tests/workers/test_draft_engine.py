"""The drafter over a real model: what it proposes, when it sends it, and that it never drafts what is stale."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence

import pytest
from transformers import LlamaForCausalLM

from draft_worker.engine import DraftEngine
from inference import PagedRuntime
from rpc.engine_host import ConnectionId, Hangup, Submitted
from speculation import draft_schedule
from speculation.fingerprint import fingerprint
from speculation.messages import (
    CloseSession,
    Commit,
    DraftCommand,
    OpenDraft,
    Proposal,
    Sampling,
    SessionError,
    SessionErrorCode,
    SessionId,
    SetLookahead,
)
from tests.doubles import reference
from tests.doubles.tiny_models import VOCAB_SIZE

MakeRuntime = Callable[..., PagedRuntime]
CONNECTION = ConnectionId(1)
SAMPLING = Sampling(1.0, 0, 0.95, 3)
PARAMETERS = reference.Parameters(1.0, 0, 0.95, 3)


class Harness:
    """Feeds an engine and keeps what it sends."""

    def __init__(
        self,
        runtime: PagedRuntime,
        flush_tokens: int = 1,
        max_step_tokens: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runtime = runtime
        self.engine = DraftEngine(runtime, VOCAB_SIZE, max_step_tokens, flush_tokens, clock)
        self.proposals: dict[int, list[Proposal]] = {}
        self.errors: dict[int, SessionError] = {}

    def send(self, session: int, *commands: DraftCommand) -> None:
        self.proposals.setdefault(session, [])
        self.engine.apply([Submitted(CONNECTION, [(SessionId(session), command) for command in commands], 0.0)])

    def step(self) -> float | None:
        result = self.engine.step()
        assert len(result.outputs) <= 1, "at most one frame per step for one connection"
        for _, frame in result.outputs:
            for session, event in frame:
                if isinstance(event, SessionError):
                    self.errors[session] = event
                else:
                    self.proposals[session].append(event)
        self.runtime.check_integrity()
        return result.wait_s

    def run(self) -> None:
        for _ in range(300):
            if self.step() is None:
                return
        raise AssertionError("the engine does not come to rest")

    def drafted(self, session: int) -> list[int]:
        return [token for proposal in self.proposals[session] for token in proposal.token_ids]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, VOCAB_SIZE), k=length)


def open_draft(prompt: Sequence[int], lookahead: int) -> OpenDraft:
    return OpenDraft(tuple(prompt), SAMPLING, lookahead)


@pytest.mark.parametrize("flush_tokens", [1, 3])
def test_proposes_what_its_model_would_say_with_the_requests_noise(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM, flush_tokens: int
) -> None:
    harness = Harness(make_runtime(), flush_tokens)
    prompts = [prompt_of(length, length) for length in (1, 6, 100)]
    for session, prompt in enumerate(prompts):
        harness.send(session, open_draft(prompt, 7))
    harness.run()
    for session, prompt in enumerate(prompts):
        assert harness.drafted(session) == reference.decode(target_model, prompt, PARAMETERS, 7)
        said = list(prompt)
        for proposal in harness.proposals[session]:
            assert (proposal.prefix_length, proposal.prefix_fingerprint) == (len(said), fingerprint(said))
            assert all(0 < confidence <= 1 for confidence in proposal.confidences)
            said += proposal.token_ids
        sizes = [len(proposal.token_ids) for proposal in harness.proposals[session]]
        assert sizes == ([1] * 7 if flush_tokens == 1 else [1, 1, 2, 3])  # the first at once, then ever more together


def test_a_commit_that_agrees_lets_it_go_on_and_one_that_does_not_starts_anew(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM
) -> None:
    prompt = prompt_of(5)
    expected = reference.decode(target_model, prompt, PARAMETERS, 12)
    harness = Harness(make_runtime())
    harness.send(0, open_draft(prompt, 4))
    harness.run()
    harness.send(0, Commit(5, tuple(expected[:3])))
    harness.run()
    assert harness.drafted(0) == expected[:7]
    other = (expected[3] + 1) % VOCAB_SIZE
    harness.send(0, Commit(8, (other,)))
    harness.proposals[0].clear()
    harness.run()
    committed = [*prompt, *expected[:3], other]
    assert harness.drafted(0) == reference.decode(target_model, committed, PARAMETERS, 4)
    assert harness.proposals[0][0].prefix_fingerprint == fingerprint(committed)


def test_what_is_looked_up_saves_steps_and_changes_no_draft(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM
) -> None:
    prompt, greedy = prompt_of(6) * 2, Sampling()
    expected = reference.decode(target_model, prompt, reference.Parameters(), 100)
    ticks = itertools.count(0.0, 0.001)  # every step costs the same, so that another row is free
    harness = Harness(make_runtime(), clock=lambda: next(ticks))
    harness.send(0, OpenDraft(tuple(prompt), greedy, 10))
    num_steps = 0
    for start in range(0, 90, 10):
        while harness.step() is not None:
            num_steps += 1
        assert harness.drafted(0) == expected[: start + 10]
        harness.send(0, Commit(len(prompt) + start, tuple(expected[start : start + 10])))
    assert num_steps < 60


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_several_tokens_in_a_row_are_those_that_come_one_by_one(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    def run(max_depth: int) -> tuple[list[list[int]], int]:
        monkeypatch.setattr(draft_schedule, "MAX_DEPTH", max_depth)
        harness, lengths = Harness(make_runtime("close", compiled=True)), (1, 6, 15)
        for session, length in enumerate(lengths):
            harness.send(session, OpenDraft(tuple(prompt_of(length, length)), Sampling(temperature, seed=5), 9))
        said, num_steps = list[list[int]](), 0
        for num_committed in (0, 3, 6):
            while harness.step() is not None:
                num_steps += 1
            for session, length in enumerate(lengths):
                said.append(harness.drafted(session))
                harness.proposals[session].clear()
                *right, wrong = said[-1][:3]
                harness.send(session, Commit(length + num_committed, (*right, (wrong + 1) % VOCAB_SIZE)))
        return said, num_steps

    chained, num_steps = run(draft_schedule.MAX_DEPTH)
    one_by_one, num_single_steps = run(1)
    assert chained == one_by_one
    assert num_steps < num_single_steps / 2


def test_lines_with_branches_grow_by_several_tokens_too(make_runtime: MakeRuntime) -> None:
    """Also where memory is short: then branches go."""
    runtime = make_runtime("close", kv_tokens=160, compiled=True)
    harness = Harness(runtime)
    for session in range(2):
        harness.send(session, OpenDraft(tuple(prompt_of(60, session)), Sampling(1.0, seed=session), 16, 0, 3))
    harness.run()
    assert not harness.errors
    assert all(len(harness.drafted(session)) >= 4 for session in range(2))
    for session in range(2):
        harness.send(session, CloseSession())
    harness.run()
    assert runtime.num_free_tokens == 160


def test_lookahead_zero_pauses_and_a_later_one_resumes(make_runtime: MakeRuntime) -> None:
    harness = Harness(make_runtime())
    harness.send(0, open_draft(prompt_of(5), 0))
    assert harness.step() is None
    assert harness.drafted(0) == []
    harness.send(0, SetLookahead(2))
    harness.run()
    assert len(harness.drafted(0)) == 2


def test_stops_where_its_context_ends(make_runtime: MakeRuntime) -> None:
    harness = Harness(make_runtime())
    harness.send(0, open_draft(prompt_of(250), 20))
    harness.run()
    assert len(harness.drafted(0)) == harness.runtime.max_context - 250


def test_short_memory_costs_one_session_its_drafts(make_runtime: MakeRuntime) -> None:
    harness = Harness(make_runtime(kv_tokens=96))
    harness.send(0, open_draft(prompt_of(30), 4))
    harness.send(1, open_draft(prompt_of(30), 4))
    harness.send(2, open_draft(prompt_of(30), 4))
    harness.run()
    assert [error.code for error in harness.errors.values()] == [SessionErrorCode.OUT_OF_MEMORY]
    assert sorted(len(harness.drafted(session)) for session in range(3))[1:] == [4, 4]


def test_bad_items_are_answered_and_disturb_nobody(make_runtime: MakeRuntime) -> None:
    harness = Harness(make_runtime())
    harness.send(0, open_draft([3], 3), open_draft([4], 3))
    harness.send(1, OpenDraft((), SAMPLING, 3))
    harness.send(2, OpenDraft((VOCAB_SIZE,), SAMPLING, 3))
    harness.send(3, Commit(0, (1,)))
    harness.send(4, open_draft([3], 3), Commit(2, (5,)))
    harness.send(5, open_draft([3], 3))
    harness.send(6, CloseSession())
    harness.run()
    assert {session: error.code for session, error in harness.errors.items()} == {
        0: SessionErrorCode.DUPLICATE_SESSION,
        1: SessionErrorCode.INVALID,
        2: SessionErrorCode.INVALID,
        3: SessionErrorCode.UNKNOWN_SESSION,
        4: SessionErrorCode.INVALID,
    }
    assert len(harness.drafted(5)) == 3


def test_close_and_hangup_free_everything(make_runtime: MakeRuntime) -> None:
    harness = Harness(make_runtime())
    free = harness.runtime.num_free_tokens
    for session in range(3):
        harness.send(session, open_draft(prompt_of(30), 9))
    harness.step()
    assert harness.runtime.num_free_tokens < free
    harness.send(0, CloseSession())
    harness.engine.apply([Hangup(CONNECTION)])
    assert harness.step() is None
    assert harness.runtime.num_free_tokens == free
