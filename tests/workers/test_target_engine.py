"""The verifier over a real model, step by step and without threads: what it says must be what the model says."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import LlamaForCausalLM

from inference import Chunk, PagedRuntime, Runtime
from rpc.engine_host import ConnectionId, Hangup, Submitted
from speculation.fingerprint import fingerprint
from speculation.messages import (
    CloseSession,
    FinishReason,
    LogprobOptions,
    OpenTarget,
    Proposal,
    Sampling,
    SessionError,
    SessionErrorCode,
    SessionId,
    SetK,
    TargetCommand,
    TokenLogprobs,
    Verdict,
)
from target_worker.engine import VerifyEngine
from target_worker.sessions import TargetSession
from tests.doubles import reference
from tests.doubles.tiny_models import VOCAB_SIZE

MakeRuntime = Callable[..., PagedRuntime]
CONNECTION = ConnectionId(1)
PARAMETERS = [
    reference.Parameters(),
    reference.Parameters(1.0, seed=5),
    reference.Parameters(0.7, top_k=20, top_p=0.9, seed=2**64 - 1),
]


class Harness:
    """Feeds an engine and keeps what each session got."""

    def __init__(self, runtime: PagedRuntime, max_step_tokens: int = 64) -> None:
        self.runtime = runtime
        # a clock on which every step takes as long as any other, so that the planner trims nothing
        self.engine = VerifyEngine(runtime, VOCAB_SIZE, max_step_tokens, clock=itertools.count(0.0, 0.01).__next__)
        self.tokens: dict[int, list[int]] = {}
        self.verdicts: dict[int, list[Verdict]] = {}
        self.errors: dict[int, SessionError] = {}

    def send(self, session: int, *commands: TargetCommand) -> None:
        self.engine.apply([Submitted(CONNECTION, [(SessionId(session), command) for command in commands], 0.0)])

    def open(
        self,
        session: int,
        prompt: Sequence[int],
        parameters: reference.Parameters,
        max_tokens: int,
        k: int = 0,
        stop: tuple[int, ...] = (),
        turns: bool = False,
        max_lookup: int = 0,
    ) -> None:
        sampling = Sampling(parameters.temperature, parameters.top_k, parameters.top_p, parameters.seed)
        self.tokens[session], self.verdicts[session] = [], []
        self.send(
            session,
            OpenTarget(tuple(prompt), sampling, len(prompt) + max_tokens, stop, k, turns, max_lookup=max_lookup),
        )

    def step(self) -> float | None:
        result = self.engine.step()
        assert len(result.outputs) <= 1, "at most one frame per step for one connection"
        for _, frame in result.outputs:
            for session, event in frame.items:
                if isinstance(event, Verdict):
                    self.tokens[session].extend(event.token_ids)
                    self.verdicts[session].append(event)
                else:
                    self.errors[session] = event
        self.runtime.check_integrity()
        return result.wait_s

    def run(self, max_steps: int = 500) -> None:
        for _ in range(max_steps):
            if self.step() is None:
                return
        raise AssertionError("the engine does not come to an end")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, VOCAB_SIZE), k=length)


def stage(harness: Harness, session: int, prefix: list[int], chain: list[int]) -> None:
    harness.send(session, Proposal(len(prefix), fingerprint(prefix), tuple(chain), (1.0,) * len(chain)))


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_plain_decoding_equals_the_reference(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM, parameters: reference.Parameters
) -> None:
    harness = Harness(make_runtime())
    prompts = [prompt_of(length, length) for length in (1, 5, 130)]  # the last one is prefilled in chunks
    for session, prompt in enumerate(prompts):
        harness.open(session, prompt, parameters, 12)
    harness.run()
    for session, prompt in enumerate(prompts):
        assert harness.tokens[session] == reference.decode(target_model, prompt, parameters, 12)
        assert harness.verdicts[session][-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_drafts_right_and_wrong_change_the_steps_and_not_the_tokens(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM, parameters: reference.Parameters, k: int
) -> None:
    prompt = prompt_of(7)
    expected = reference.decode(target_model, prompt, parameters, 30)
    harness = Harness(make_runtime())
    harness.open(0, prompt, parameters, 30, k=k)
    harness.open(1, prompt_of(20), parameters, 30)  # somebody else in the batch
    while len(harness.tokens[0]) < 30:
        said = harness.tokens[0]
        rest = expected[len(said) : len(said) + 10]
        if rest and len(said) % 3 == 0:
            rest[-1] = (rest[-1] + 1) % VOCAB_SIZE
        if rest:
            stage(harness, 0, prompt + said, rest)
        harness.step()
    assert harness.tokens[0] == expected
    verdicts = harness.verdicts[0]
    assert max(verdict.num_accepted for verdict in verdicts) == k
    assert all(verdict.num_drafted <= k for verdict in verdicts)
    assert len(verdicts) < 30


def test_a_right_chain_is_followed_without_further_messages(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM
) -> None:
    prompt, parameters = prompt_of(4), PARAMETERS[1]
    expected = reference.decode(target_model, prompt, parameters, 20)
    harness = Harness(make_runtime())
    harness.open(0, prompt, parameters, 20, k=4)
    stage(harness, 0, prompt, expected[:19])
    harness.run()
    assert harness.tokens[0] == expected
    # the prefill draws one token; then 4 drafted and the target's own in each step
    assert [len(verdict.token_ids) for verdict in harness.verdicts[0]] == [1, 5, 5, 5, 4]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_what_is_looked_up_changes_the_steps_and_not_the_tokens(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM, parameters: reference.Parameters
) -> None:
    """Nobody drafts, and the greedy text soon repeats itself."""
    prompt = prompt_of(6) * 2
    harness = Harness(make_runtime())
    harness.open(0, prompt, parameters, 60, max_lookup=4)
    harness.run()
    assert harness.tokens[0] == reference.decode(target_model, prompt, parameters, 60)
    verdicts = harness.verdicts[0]
    assert sum(verdict.num_looked_up for verdict in verdicts) > 0
    assert not any(verdict.num_drafted or verdict.missed for verdict in verdicts)
    if not parameters.temperature:
        assert sum(verdict.num_looked_up_accepted for verdict in verdicts) > 10
        assert len(verdicts) < 50


def test_a_stop_token_among_accepted_drafts_ends_the_session(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM
) -> None:
    prompt, parameters = prompt_of(4), PARAMETERS[1]
    expected = reference.decode(target_model, prompt, parameters, 20)
    stop = next(token for index, token in enumerate(expected) if index > 2 and token not in expected[:index])
    harness = Harness(make_runtime())
    harness.open(0, prompt, parameters, 20, k=8, stop=(stop,))
    stage(harness, 0, prompt, expected)
    harness.run()
    assert harness.tokens[0] == expected[: expected.index(stop) + 1]
    assert harness.verdicts[0][-1].finish_reason is FinishReason.STOP


def test_short_memory_shrinks_the_batch_and_not_the_answers(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM
) -> None:
    parameters = PARAMETERS[2]
    harness = Harness(make_runtime(kv_tokens=160))
    prompts = [prompt_of(40, seed) for seed in range(4)]  # 4 sessions of 70 tokens do not fit into 160 positions
    for session, prompt in enumerate(prompts):
        harness.open(session, prompt, parameters, 30, k=4)
        stage(harness, session, prompt, prompt_of(20, 99))
    harness.run(2000)
    for session, prompt in enumerate(prompts):
        assert harness.tokens[session] == reference.decode(target_model, prompt, parameters, 30)
    assert harness.runtime.num_free_tokens == 160


@torch.inference_mode()
def full_forward(model: LlamaForCausalLM, token_ids: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """Log-probabilities of each next token, [len(token_ids), V], of what ``sampling`` draws from."""
    scores = model(torch.tensor([token_ids]), use_cache=False).logits[0].float() / (sampling.temperature or 1.0)
    if sampling.top_k:
        scores[scores < scores.topk(sampling.top_k).values[:, -1:]] = -torch.inf
    return scores.log_softmax(-1)


def assert_tells_of(found: Sequence[TokenLogprobs], rows: torch.Tensor, token_ids: Sequence[int], num_top: int) -> None:
    """``found[i]`` is what ``rows[i]`` says of ``token_ids[i]`` and of the most likely tokens."""
    assert len(found) == len(rows) == len(token_ids)
    for one, row, token_id in zip(found, rows, token_ids, strict=True):
        assert one.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        best = row.topk(num_top)
        assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [float(row[token]) for token, _ in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_short_memory_costs_lookups_before_drafts(make_runtime: MakeRuntime) -> None:
    """There is room for the draft and not for what was looked up behind it."""
    prompt = prompt_of(3) * 4
    harness = Harness(make_runtime(kv_tokens=32))
    harness.open(0, prompt, reference.Parameters(), 20, k=1, max_lookup=8)
    harness.open(1, prompt_of(12, 1), reference.Parameters(), 20)  # has the other half of the memory
    harness.step()
    stage(harness, 0, prompt + harness.tokens[0], prompt[:1])
    harness.step()
    verdict = harness.verdicts[0][1]
    assert (verdict.num_drafted, verdict.num_looked_up) == (1, 0)


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize(
    "parameters",
    [reference.Parameters(), reference.Parameters(0.7, top_k=20, seed=5)],
    ids=["greedy", "sampled"],
)
def test_logprobs_survive_the_loss_of_the_cache(
    make_runtime: MakeRuntime,
    target_model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    parameters: reference.Parameters,
    processed: bool,
) -> None:
    num_tokens, num_top = 30, 5
    sampling = Sampling(parameters.temperature, parameters.top_k, parameters.top_p, parameters.seed)
    harness = Harness(make_runtime(kv_tokens=192))
    give_back, lost_at = TargetSession.preempt, set[int]()

    def preempt(session: TargetSession, runtime: Runtime) -> None:
        lost_at.add(len(harness.tokens[session.key[1]]))
        give_back(session, runtime)

    monkeypatch.setattr(TargetSession, "preempt", preempt)
    prompts = [*(prompt_of(40, seed) for seed in range(4)), prompt_of(150, 4)]  # the last is prefilled in chunks
    answers = [reference.decode(target_model, prompt, parameters, num_tokens) for prompt in prompts]
    for session, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        harness.tokens[session], harness.verdicts[session] = [], []
        options, length = LogprobOptions(num_top, processed), len(prompt) + num_tokens
        harness.send(session, OpenTarget(tuple(prompt), sampling, length, (), 4, False, options, num_top))
        stage(harness, session, prompt, [*answer[:9], (answer[9] + 1) % VOCAB_SIZE])
    harness.run()
    assert any(0 < place < num_tokens for place in lost_at), "no cache was lost in the middle of an answer"
    for session, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert harness.tokens[session] == answer
        first, *others = harness.verdicts[session]
        assert not any(verdict.prompt_logprobs for verdict in others), "what has been told is not told again"
        rows = full_forward(target_model, [*prompt, *answer[:-1]], Sampling())
        assert_tells_of(first.prompt_logprobs, rows[: len(prompt) - 1], prompt[1:], num_top)
        if processed:
            rows = full_forward(target_model, [*prompt, *answer[:-1]], sampling)
        told = [one for verdict in harness.verdicts[session] for one in verdict.logprobs]
        assert_tells_of(told, rows[len(prompt) - 1 :], answer, num_top)


def test_what_never_fits_fails_alone(make_runtime: MakeRuntime, target_model: LlamaForCausalLM) -> None:
    harness = Harness(make_runtime(kv_tokens=64))
    harness.open(0, prompt_of(100), PARAMETERS[0], 5)
    harness.open(1, prompt_of(10), PARAMETERS[0], 5)
    harness.run()
    assert harness.errors[0].code is SessionErrorCode.CONTEXT_OVERFLOW
    assert harness.tokens[1] == reference.decode(target_model, prompt_of(10), PARAMETERS[0], 5)


def test_bad_opens_are_answered_and_disturb_nobody(make_runtime: MakeRuntime) -> None:
    harness = Harness(make_runtime())
    harness.open(1, [3], PARAMETERS[0], 10)
    harness.open(2, [], PARAMETERS[0], 10)
    harness.open(3, [VOCAB_SIZE], PARAMETERS[0], 10)
    harness.open(4, [3], PARAMETERS[0], 10_000)
    harness.send(5, OpenTarget((3,), Sampling(float("nan")), 9, (), 0))
    harness.send(6, OpenTarget((3,), Sampling(top_p=0.0), 9, (), 0))
    harness.send(7, SetK(3), CloseSession(), Proposal(1, 1, (1,), (1.0,)))  # unknown: an ordinary race
    harness.run()
    codes = {session: error.code for session, error in harness.errors.items()}
    assert codes == {
        2: SessionErrorCode.INVALID,
        3: SessionErrorCode.INVALID,
        4: SessionErrorCode.CONTEXT_OVERFLOW,
        5: SessionErrorCode.INVALID,
        6: SessionErrorCode.INVALID,
    }
    assert len(harness.tokens[1]) == 10


def test_close_and_hangup_free_everything(make_runtime: MakeRuntime) -> None:
    harness = Harness(make_runtime())
    free = harness.runtime.num_free_tokens
    for session in range(3):
        harness.open(session, prompt_of(30), PARAMETERS[0], 50)
    harness.step()
    assert harness.runtime.num_free_tokens < free
    harness.send(0, CloseSession())
    harness.engine.apply([Hangup(CONNECTION)])
    assert harness.step() is None
    assert harness.runtime.num_free_tokens == free


def test_a_resumed_session_says_what_the_first_would_have_said(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM
) -> None:
    prompt, parameters = prompt_of(9), PARAMETERS[1]
    expected = reference.decode(target_model, prompt, parameters, 20)
    harness = Harness(make_runtime())
    harness.open(0, prompt + expected[:8], parameters, 12)
    harness.run()
    assert harness.tokens[0] == expected[8:]


def test_a_session_that_takes_turns_steps_with_whole_turns_only(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM
) -> None:
    prompt = prompt_of(7)
    expected = reference.decode(target_model, prompt, PARAMETERS[0], 11)
    harness = Harness(make_runtime())
    harness.open(0, prompt, PARAMETERS[0], 11, k=3, turns=True)
    harness.step()
    while harness.tokens[0] != expected:
        num_said = len(harness.tokens[0])
        for index, token_id in enumerate(expected[num_said:-1][:3], start=num_said):
            wait_s = harness.step()
            assert wait_s is not None
            assert wait_s > 0
            assert len(harness.tokens[0]) == num_said
            stage(harness, 0, prompt + expected[:index], [token_id])
        harness.step()
    assert [verdict.num_drafted for verdict in harness.verdicts[0]] == [0, 3, 3, 1]


@pytest.mark.parametrize("num_replayed", [0, 1, 9])
def test_a_replayed_session_knows_where_its_output_began(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM, num_replayed: int
) -> None:
    prompt, stop = prompt_of(8), tuple(range(0, VOCAB_SIZE, 3))
    limits = {"presence_penalty": 1.5, "frequency_penalty": 0.8, "bad_words": tuple((id_, 50) for id_ in range(200))}
    expected = reference.decode(
        target_model, prompt, reference.Parameters(1.0, seed=3, min_tokens=14, **limits), 30, stop_token_ids=stop
    )
    assert len(expected) >= 15
    sampling = Sampling(1.0, seed=3, min_length=8 + 14, prompt_length=8, **limits)
    harness = Harness(make_runtime())
    harness.tokens[0], harness.verdicts[0] = [], []
    committed = (*prompt, *expected[:num_replayed])
    harness.send(0, OpenTarget(committed, sampling, 38, stop, 4))
    stage(harness, 0, list(committed), expected[num_replayed : num_replayed + 6])
    harness.run()
    assert harness.tokens[0] == expected[num_replayed:]
    assert harness.verdicts[0][-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(min_p=-0.1),
        Sampling(repetition_penalty=-1.0),
        Sampling(presence_penalty=float("nan")),
        Sampling(frequency_penalty=float("inf")),
        Sampling(logit_bias=((1, float("nan")),)),
        Sampling(prompt_length=2),
    ],
)
def test_impossible_sampling_ends_that_session_alone(make_runtime: MakeRuntime, sampling: Sampling) -> None:
    harness = Harness(make_runtime())
    harness.open(0, [3], reference.Parameters(), 4)
    harness.send(1, OpenTarget((3,), sampling, 9, (), 0))
    harness.run()
    assert harness.errors[1].code is SessionErrorCode.INVALID
    assert len(harness.tokens[0]) == 4


def count_tokens(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each step runs."""
    counts: list[int] = []
    forward = harness.runtime.forward

    def counted(batch: Sequence[Chunk]) -> torch.Tensor:
        logits = forward(batch)
        counts.append(sum(len(chunk.token_ids) for chunk in batch))
        return logits

    monkeypatch.setattr(harness.runtime, "forward", counted)
    return counts


def fork(harness: Harness, parent: int, session: int, prompt: Sequence[int], seed: int, max_tokens: int) -> None:
    harness.tokens[session], harness.verdicts[session] = [], []
    sampling = Sampling(1.0, seed=seed)
    command = OpenTarget(tuple(prompt), sampling, len(prompt) + max_tokens, (), 0, fork_of=SessionId(parent))
    harness.send(session, command)


@pytest.mark.parametrize("num_tokens_of_parent", [1, 9])
def test_forks_share_one_prefill(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM, monkeypatch, num_tokens_of_parent: int
) -> None:
    prompt, harness = prompt_of(130), Harness(make_runtime())  # prefilled in three steps
    counts = count_tokens(harness, monkeypatch)
    harness.open(1, prompt, reference.Parameters(1.0, seed=1), num_tokens_of_parent)
    for session in (2, 3, 4):
        fork(harness, 1, session, prompt, session, 9)
    harness.run()
    for session, tokens in harness.tokens.items():
        num_tokens = num_tokens_of_parent if session == 1 else 9
        assert tokens == reference.decode(target_model, prompt, reference.Parameters(1.0, seed=session), num_tokens)
    assert sum(counts) == 130 + (num_tokens_of_parent - 1) + 3 * 9
    assert harness.runtime.num_free_tokens == 4096


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_forks_outlive_their_parent(
    make_runtime: MakeRuntime, target_model: LlamaForCausalLM, monkeypatch, num_steps: int
) -> None:
    prompt, harness = prompt_of(130), Harness(make_runtime())
    harness.open(1, prompt, reference.Parameters(1.0, seed=1), 9)
    fork(harness, 1, 2, prompt, 2, 9)
    fork(harness, 1, 3, prompt, 3, 9)
    for _ in range(num_steps):
        harness.step()
    harness.send(1, CloseSession())
    counts = count_tokens(harness, monkeypatch)
    harness.run()
    for session in (2, 3):
        expected = reference.decode(target_model, prompt, reference.Parameters(1.0, seed=session), 9)
        assert harness.tokens[session] == expected
    assert sum(counts) <= 130 + 2 * 9  # the first of them prefills, the other shares


def test_a_fork_of_something_else_is_prefilled(make_runtime: MakeRuntime, target_model: LlamaForCausalLM) -> None:
    harness = Harness(make_runtime())
    harness.open(1, prompt_of(20), reference.Parameters(), 9)
    fork(harness, 1, 2, prompt_of(20, seed=1), 2, 9)  # another prompt
    fork(harness, 7, 3, prompt_of(20), 3, 9)  # nobody
    fork(harness, 4, 4, prompt_of(1), 4, 9)  # itself, with nothing to share
    harness.run()
    for session, prompt in ((2, prompt_of(20, seed=1)), (3, prompt_of(20)), (4, prompt_of(1))):
        expected = reference.decode(target_model, prompt, reference.Parameters(1.0, seed=session), 9)
        assert harness.tokens[session] == expected


def test_forks_in_short_memory_take_turns(make_runtime: MakeRuntime, target_model: LlamaForCausalLM) -> None:
    prompt, harness = prompt_of(60), Harness(make_runtime(kv_tokens=96))
    harness.open(1, prompt, reference.Parameters(1.0, seed=1), 30)
    for session in (2, 3, 4):
        fork(harness, 1, session, prompt, session, 30)
    harness.run()
    assert not harness.errors
    for session, tokens in harness.tokens.items():
        assert tokens == reference.decode(target_model, prompt, reference.Parameters(1.0, seed=session), 30)
