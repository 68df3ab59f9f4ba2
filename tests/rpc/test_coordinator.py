"""A coordinator between real gRPC workers and a real gRPC client: the tokens are the target's, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from coordinator.requests import GenerateRequest
from coordinator.settings import CoordinatorSettings
from protos import generation_pb2
from rpc.errors import (
    InvalidRequest,
    ModelMismatch,
    ModelNotFound,
    Overloaded,
    SessionFailed,
    SlowReader,
    Unavailable,
    from_rpc_error,
)
from speculation.messages import (
    CloseSession,
    OpenDraft,
    OpenTarget,
    SessionError,
    SessionErrorCode,
)
from tests.doubles.eventually import eventually
from tests.doubles.scripted_workers import TOY_LETTERS, ScriptedDrafter, ScriptedTarget, toy_tokenizer_json
from tests.doubles.toy_model import STOP_TOKEN, plain_decoding
from tests.rpc.conftest import (
    PROMPT,
    Answer,
    Stack,
    collect,
    generate_request,
    make_coordinator,
    running_stack,
    running_worker,
    spoken,
)


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with running_stack([ScriptedTarget()], [ScriptedDrafter()]) as stack:
        yield stack


async def generate(stack: Stack, request: generation_pb2.GenerateRequest) -> Answer:
    return await collect(stack.stub.Generate(request))


# -- the happy path -------------------------------------------------------------------------------------------------


async def test_tokens_are_the_targets_and_most_of_them_were_drafted(stack: Stack) -> None:
    answer = await generate(stack, generate_request(max_tokens=80, seed=7))

    assert answer.token_ids == spoken(PROMPT, 80)
    assert answer.text == "".join(TOY_LETTERS[id_ - 1] for id_ in answer.token_ids if id_ != STOP_TOKEN)
    assert answer.started is not None
    assert (answer.started.seed, answer.started.prompt_tokens, answer.started.model) == (7, 3, "toy-target")
    assert answer.finished is not None
    assert answer.finished.finish_reason == "length"
    assert answer.finished.usage.completion_tokens == 80
    stats = answer.finished.speculation
    assert stats.num_accepted == sum(answer.drafted) > 20
    assert stats.num_accepted <= stats.num_drafted
    assert stats.policy == "fixed"
    assert 0 < answer.finished.timing.first_token_s <= answer.finished.timing.total_s
    await eventually(lambda: stack.num_worker_sessions == 0, "all sessions closed")


async def test_stop_token_ends_the_answer_and_has_no_text(stack: Stack) -> None:
    request = generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=PROMPT))

    answer = await generate(stack, request)

    assert answer.token_ids == plain_decoding(PROMPT, 4096)
    assert answer.token_ids[-1] == STOP_TOKEN
    assert answer.finished is not None
    assert answer.finished.finish_reason == "stop"
    assert len(answer.text) == len(answer.token_ids) - 1


async def test_text_prompt_is_tokenized(stack: Stack) -> None:
    request = generate_request(max_tokens=10)
    request.text = "abc"

    assert (await generate(stack, request)).token_ids == spoken((1, 2, 3), 10)


async def test_disabled_speculation_opens_no_drafter(stack: Stack) -> None:
    options = generation_pb2.SpeculationOptions(disabled=True)

    answer = await generate(stack, generate_request(max_tokens=30, speculation=options))

    assert answer.token_ids == spoken(PROMPT, 30)
    assert answer.finished is not None
    assert answer.finished.speculation.policy == "off"
    assert answer.finished.speculation.num_drafted == 0
    assert stack.drafts[0].core.commands == []


@pytest.mark.parametrize("policy", ["fixed", "threshold", "goodput"])
async def test_every_policy_says_the_same(stack: Stack, policy: str) -> None:
    options = generation_pb2.SpeculationOptions(policy=policy, k=3)

    answer = await generate(stack, generate_request(max_tokens=60, speculation=options))

    assert answer.token_ids == spoken(PROMPT, 60)
    assert answer.finished is not None
    assert answer.finished.speculation.policy == policy
    assert answer.finished.speculation.num_drafted > 0


async def test_many_sessions_at_once_do_not_mix(stack: Stack) -> None:
    prompts = [(1 + index % 10, 1 + index // 10, 5) for index in range(12)]

    answers = await asyncio.gather(
        *(generate(stack, generate_request(max_tokens=40, prompt=prompt)) for prompt in prompts)
    )

    assert [answer.token_ids for answer in answers] == [spoken(prompt, 40) for prompt in prompts]
    await eventually(lambda: stack.num_worker_sessions == 0, "all sessions closed")


async def test_sessions_are_spread_over_pairs() -> None:
    targets = [ScriptedTarget(), ScriptedTarget()]
    drafts = [ScriptedDrafter(), ScriptedDrafter()]
    async with running_stack(targets, drafts) as stack:
        for target in targets:
            target.hold()
        answers = [asyncio.create_task(generate(stack, generate_request())) for _ in range(4)]
        await eventually(lambda: stack.num_worker_sessions == 8, "four sessions at targets and drafters")
        assert [worker.num_sessions for worker in (*targets, *drafts)] == [2, 2, 2, 2]
        for target in targets:
            target.release()
        assert [answer.token_ids for answer in await asyncio.gather(*answers)] == [spoken(PROMPT, 40)] * 4


async def test_get_model(stack: Stack) -> None:
    served = await stack.stub.GetModel(generation_pb2.GetServedModelRequest())

    assert (served.name, list(served.draft_models)) == ("toy-target", ["toy-draft"])
    assert (served.num_targets, served.num_drafters, served.policy, served.max_k) == (1, 1, "fixed", 4)
    assert list(served.eos_token_ids) == [STOP_TOKEN]


async def test_counts_frames_both_ways(stack: Stack) -> None:
    await collect(stack.stub.Generate(generate_request(max_tokens=20)))

    traffic = (await stack.stub.GetModel(generation_pb2.GetServedModelRequest())).traffic

    assert traffic.num_target_steps == traffic.num_frames_from_targets > 0
    assert traffic.num_frames_to_targets > 0
    assert traffic.num_frames_to_drafters > 0
    assert traffic.num_frames_from_drafters > 0


# -- workers come and go --------------------------------------------------------------------------------------------


async def test_lost_drafter_means_plain_decoding_and_speculation_when_it_is_back(stack: Stack) -> None:
    [target], [draft] = stack.targets, stack.drafts
    answer = Answer()
    target.core.hold(num_turns=10)
    running = asyncio.create_task(collect(stack.stub.Generate(generate_request(max_tokens=400)), answer))
    await eventually(lambda: any(answer.drafted), "an accepted drafted token")

    await draft.kill()
    await eventually(lambda: stack.coordinator.deployment().num_drafters == 0, "the loss noticed")
    num_turns_before = target.core.num_turns
    target.core.hold(num_turns=20)  # what was staged is used up in these, and plain decoding goes on
    await eventually(lambda: target.core.num_turns >= num_turns_before + 20, "20 turns without a drafter")
    target.core.hold()
    num_drafted_before = sum(answer.drafted)
    await draft.start()
    await eventually(lambda: draft.core.num_sessions == 1, "the session at the drafter again")
    target.core.release()
    await running

    assert answer.token_ids == spoken(PROMPT, 400)
    assert answer.finished is not None
    assert answer.finished.speculation.num_draft_losses == 1
    assert answer.finished.speculation.num_free_run_steps >= 10
    assert sum(answer.drafted) > num_drafted_before


async def test_another_drafter_takes_over_at_once() -> None:
    drafts = [ScriptedDrafter(), ScriptedDrafter()]
    async with running_stack([ScriptedTarget()], drafts) as stack:
        [target] = stack.targets
        target.core.hold(num_turns=4)
        running = asyncio.create_task(generate(stack, generate_request(max_tokens=100)))
        await eventually(lambda: sum(draft.num_sessions for draft in drafts) == 1, "the session at a drafter")
        [used] = [worker for worker in stack.drafts if worker.core.num_sessions]
        [other] = [worker for worker in stack.drafts if worker is not used]

        await used.kill()

        await eventually(lambda: other.core.num_sessions == 1, "the session at the other drafter")
        target.core.release()
        assert (await running).token_ids == spoken(PROMPT, 100)


async def test_drafter_may_come_first_of_all_after_the_request() -> None:
    late = ScriptedDrafter()
    async with running_stack([ScriptedTarget()], [late]) as stack:
        [target], [draft] = stack.targets, stack.drafts
        await draft.kill()
        await eventually(lambda: stack.coordinator.deployment().num_drafters == 0, "the loss noticed")
        target.core.hold(num_turns=5)
        running = asyncio.create_task(generate(stack, generate_request(max_tokens=100)))
        await eventually(lambda: target.core.num_turns >= 5, "5 plain turns")
        await draft.start()
        await eventually(lambda: late.num_sessions == 1, "the running session at the drafter")
        target.core.release()
        answer = await running

    assert answer.token_ids == spoken(PROMPT, 100)
    assert any(answer.drafted)
    assert answer.finished is not None
    assert answer.finished.speculation.num_draft_losses == 0


async def test_drafter_that_gives_up_a_session_is_not_needed(stack: Stack) -> None:
    [target], [draft] = stack.targets, stack.drafts
    target.core.hold(num_turns=5)
    running = asyncio.create_task(generate(stack, generate_request(max_tokens=100)))
    await eventually(lambda: draft.core.num_turns > 0, "the drafter drafting")
    draft.core.refuse_all()
    target.core.release()
    answer = await running

    assert answer.token_ids == spoken(PROMPT, 100)
    assert answer.finished is not None
    assert answer.finished.speculation.num_draft_losses == 1
    assert [type(command) for command in draft.core.commands].count(OpenDraft) == 1


async def test_drafter_that_gave_up_a_session_has_room_for_another() -> None:
    drafts = [ScriptedDrafter(), ScriptedDrafter()]
    async with running_stack([ScriptedTarget()], drafts) as stack:
        [target] = stack.targets
        target.core.hold(num_turns=3)
        first = asyncio.create_task(generate(stack, generate_request()))
        await eventually(lambda: drafts[0].num_sessions == 1, "the first session at the first drafter")
        drafts[0].refuse_all()
        await eventually(
            lambda: not any(one.num_sessions for one in stack.coordinator._live_state().workers if one.role == "draft"),
            "the refusal noticed",
        )
        second = asyncio.create_task(generate(stack, generate_request()))
        await eventually(lambda: drafts[0].num_sessions + drafts[1].num_sessions == 1, "the second at a drafter")
        assert drafts[0].num_sessions == 1
        target.core.release()
        answers = await asyncio.gather(first, second)

    assert [answer.token_ids for answer in answers] == [spoken(PROMPT, 40)] * 2


async def test_rubbish_from_a_drafter_changes_nothing() -> None:
    # A step takes many round trips here, so that there is something to verify at each.
    async with running_stack([ScriptedTarget(turn_s=0.03)], [ScriptedDrafter(percent_right=0)]) as stack:
        answer = await generate(stack, generate_request(max_tokens=30))

    assert answer.token_ids == spoken(PROMPT, 30)
    assert answer.finished is not None
    assert answer.finished.speculation.num_drafted > answer.finished.speculation.num_accepted


async def test_lost_target_is_replaced_by_another() -> None:
    targets = [ScriptedTarget(), ScriptedTarget()]
    async with running_stack(targets, [ScriptedDrafter()]) as stack:
        answer = Answer()
        for target in targets:
            target.hold(num_turns=6)
        running = asyncio.create_task(collect(stack.stub.Generate(generate_request(max_tokens=200)), answer))
        await eventually(lambda: len(answer.token_ids) >= 6, "some tokens")
        [used] = [worker for worker in stack.targets if worker.core.num_sessions]
        await used.kill()
        for target in targets:
            target.release()
        await running

    [other] = [worker for worker in stack.targets if worker is not used]
    assert answer.token_ids == spoken(PROMPT, 200)
    assert answer.finished is not None
    assert answer.finished.speculation.num_target_losses == 1
    [replay] = [command for command in other.core.commands if isinstance(command, OpenTarget)]
    assert len(replay.token_ids) >= len(PROMPT) + 6


async def test_lost_target_may_come_back_itself(stack: Stack) -> None:
    [target] = stack.targets
    answer = Answer()
    target.core.hold(num_turns=6)
    running = asyncio.create_task(collect(stack.stub.Generate(generate_request(max_tokens=200)), answer))
    await eventually(lambda: len(answer.token_ids) >= 6, "some tokens")

    await target.kill()
    await eventually(lambda: stack.coordinator.deployment().num_targets == 0, "the loss noticed")
    target.core.release()
    await target.start()
    await running

    assert answer.token_ids == spoken(PROMPT, 200)
    assert answer.finished is not None
    assert answer.finished.speculation.num_target_losses == 1


async def test_replayed_sessions_come_before_new_ones() -> None:
    async with running_stack([ScriptedTarget()], max_sessions=1) as stack:
        [target] = stack.targets
        target.core.hold(num_turns=3)
        first, second = Answer(), Answer()
        running = asyncio.create_task(collect(stack.stub.Generate(generate_request(max_tokens=50)), first))
        await eventually(lambda: len(first.token_ids) == 3, "three tokens of the first")
        waiting = asyncio.create_task(collect(stack.stub.Generate(generate_request(max_tokens=50)), second))
        await eventually(lambda: stack.coordinator.num_waiting == 1, "the second waiting")

        await target.kill()
        await eventually(lambda: stack.coordinator.num_waiting == 2, "both waiting")
        await target.start()
        await eventually(lambda: target.core.num_sessions == 1, "one at the target again")

        assert second.started is None
        target.core.release()
        await asyncio.gather(running, waiting)
    assert first.token_ids == second.token_ids == spoken(PROMPT, 50)


async def test_no_target_for_too_long_is_unavailable() -> None:
    async with running_stack([ScriptedTarget()], target_wait_s=0.2) as stack:
        [target] = stack.targets
        target.core.hold(num_turns=3)
        call = stack.stub.Generate(generate_request(max_tokens=200))
        answer = Answer()
        running = asyncio.create_task(collect(call, answer))
        await eventually(lambda: len(answer.token_ids) == 3, "three tokens")
        await target.kill()

        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await running
        with pytest.raises(grpc.aio.AioRpcError) as new:
            await generate(stack, generate_request())

    for caught in (lost, new):
        error = from_rpc_error(caught.value)
        assert isinstance(error, Unavailable)
        assert target.address in error.message
    assert answer.token_ids == spoken(PROMPT, 3)


async def test_target_that_gives_up_one_session_fails_that_one_alone(stack: Stack) -> None:
    [target] = stack.targets
    target.core.hold()
    other = asyncio.create_task(generate(stack, generate_request()))
    await eventually(lambda: target.core.num_sessions == 1, "the other session open")
    target.core.fail_next_open = SessionError(SessionErrorCode.INTERNAL, "no kernel for this shape")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stack, generate_request())
    target.core.release()

    error = from_rpc_error(caught.value)
    assert isinstance(error, SessionFailed)
    assert "no kernel for this shape" in error.message
    assert (await other).token_ids == spoken(PROMPT, 40)
    await eventually(lambda: stack.num_worker_sessions == 0, "all sessions closed")


# -- clients come and go --------------------------------------------------------------------------------------------


async def test_cancelling_closes_the_session_on_both_workers(stack: Stack) -> None:
    [target], [draft] = stack.targets, stack.drafts
    target.core.hold(num_turns=4)
    call = stack.stub.Generate(generate_request(max_tokens=4000))
    async for event in call:
        if event.WhichOneof("event") == "tokens":
            break
    await eventually(lambda: stack.num_worker_sessions == 2, "the session at both workers")

    call.cancel()

    await eventually(lambda: stack.num_worker_sessions == 0, "the session closed at both workers")
    assert CloseSession() in target.core.commands
    assert CloseSession() in draft.core.commands


async def test_client_that_vanishes_while_events_flow(stack: Stack) -> None:
    channel_call = stack.stub.Generate(generate_request(max_tokens=4000))
    await anext(aiter(channel_call))
    await eventually(lambda: stack.targets[0].core.num_turns > 20, "events on their way")

    channel_call.cancel()

    await eventually(lambda: stack.num_worker_sessions == 0, "the session closed at both workers")


async def test_deadline_stops_the_work(stack: Stack) -> None:
    stack.targets[0].core.hold(num_turns=2)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stack.stub.Generate(generate_request(max_tokens=4000), timeout=0.3))

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: stack.num_worker_sessions == 0, "the session closed at both workers")


async def test_slow_reader_fails_alone() -> None:
    async with running_stack([ScriptedTarget(turn_s=0.0002)], max_buffered_events=8) as stack:
        events = stack.coordinator.generate(GenerateRequest(prompt=PROMPT, max_tokens=100, ignore_eos=True))
        await anext(events)
        target = stack.targets[0].core
        await eventually(lambda: CloseSession() in target.commands, "the unread session ended")
        assert stack.num_worker_sessions == 0
        with pytest.raises(SlowReader):
            async for _ in events:
                pass
        assert (await generate(stack, generate_request())).token_ids == spoken(PROMPT, 40)


# -- admission ------------------------------------------------------------------------------------------------------


async def test_full_queue_is_resource_exhausted_with_a_hint_and_waiting_ones_are_served_in_order() -> None:
    async with running_stack([ScriptedTarget()], max_sessions=1, max_queue=1) as stack:
        [target] = stack.targets
        target.core.hold()
        first = asyncio.create_task(generate(stack, generate_request()))
        await eventually(lambda: target.core.num_sessions == 1, "the first running")
        second = asyncio.create_task(generate(stack, generate_request()))
        await eventually(lambda: stack.coordinator.num_waiting == 1, "the second waiting")

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(stack, generate_request())
        target.core.release()

        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = from_rpc_error(caught.value)
        assert isinstance(error, Overloaded)
        assert 0 < error.retry_after_s <= 30
        answers = await asyncio.gather(first, second)
        assert [answer.token_ids for answer in answers] == [spoken(PROMPT, 40)] * 2
        assert answers[0].finished is not None
        assert answers[1].finished is not None
        assert answers[1].finished.timing.queue_s > answers[0].finished.timing.queue_s


async def test_waiting_too_long_is_resource_exhausted() -> None:
    async with running_stack([ScriptedTarget()], max_sessions=1, queue_timeout_s=0.1) as stack:
        stack.targets[0].core.hold()
        first = asyncio.create_task(generate(stack, generate_request()))
        await eventually(lambda: stack.num_worker_sessions == 1, "the first running")

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(stack, generate_request())

        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        stack.targets[0].core.release()
        await first


async def test_cancelled_while_waiting_leaves_the_queue() -> None:
    async with running_stack([ScriptedTarget()], max_sessions=1) as stack:
        stack.targets[0].core.hold()
        first = asyncio.create_task(generate(stack, generate_request()))
        await eventually(lambda: stack.num_worker_sessions == 1, "the first running")
        waiting = stack.stub.Generate(generate_request())
        await eventually(lambda: stack.coordinator.num_waiting == 1, "the second waiting")

        waiting.cancel()

        await eventually(lambda: stack.coordinator.num_waiting == 0, "the queue empty")
        stack.targets[0].core.release()
        await first


# -- bad input ------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD_REQUESTS = {
    "empty text": (generation_pb2.GenerateRequest(text=""), "prompt"),
    "no prompt": (generation_pb2.GenerateRequest(), "prompt"),
    "empty tokens": (generate_request(prompt=()), "prompt"),
    "prompt beyond the context": (generate_request(prompt=[1] * 4096, max_tokens=1), "prompt"),
    "prompt token above the vocabulary": (generate_request(prompt=[1, 11]), "prompt"),
    "negative prompt token": (generate_request(prompt=[-1]), "prompt"),
    "max_tokens 0": (generate_request(max_tokens=0), "max_tokens"),
    "max_tokens negative": (generate_request(max_tokens=-5), "max_tokens"),
    "max_tokens beyond the context": (generate_request(max_tokens=4094), "max_tokens"),
    "temperature negative": (generate_request(temperature=-0.1), "temperature"),
    "temperature NaN": (generate_request(temperature=NAN), "temperature"),
    "temperature infinite": (generate_request(temperature=INF), "temperature"),
    "top_p 0": (generate_request(top_p=0.0), "top_p"),
    "top_p above 1": (generate_request(top_p=1.01), "top_p"),
    "top_p NaN": (generate_request(top_p=NAN), "top_p"),
    "top_k negative": (generate_request(top_k=-1), "top_k"),
    "stop token outside": (generate_request(stop_token_ids=[2**40]), "stop_token_ids"),
    "too many stop tokens": (generate_request(stop_token_ids=[1] * 65), "stop_token_ids"),
    "k above 64": (generate_request(speculation=generation_pb2.SpeculationOptions(k=65)), "speculation.k"),
    "k negative": (generate_request(speculation=generation_pb2.SpeculationOptions(k=-1)), "speculation.k"),
    "lookahead": (
        generate_request(speculation=generation_pb2.SpeculationOptions(lookahead=257)),
        "speculation.lookahead",
    ),
    "policy": (generate_request(speculation=generation_pb2.SpeculationOptions(policy="hope")), "speculation.policy"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bad_field_is_named_and_disturbs_nobody(stack: Stack, name: str) -> None:
    request, field = BAD_REQUESTS[name]
    other = asyncio.create_task(generate(stack, generate_request()))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stack, request)

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert [violation.field for violation in error.violations] == [field]
    assert (await other).token_ids == spoken(PROMPT, 40)


async def test_all_bad_fields_are_named_at_once(stack: Stack) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stack, generate_request(prompt=(), max_tokens=0, temperature=-1.0, top_p=2.0, top_k=-1))

    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert [violation.field for violation in error.violations] == [
        "prompt",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
    ]


async def test_unknown_model_is_not_found(stack: Stack) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stack, generate_request(model="gpt-9"))

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    error = from_rpc_error(caught.value)
    assert isinstance(error, ModelNotFound)
    assert "toy-target" in error.message


# -- vocabularies ---------------------------------------------------------------------------------------------------


async def test_drafter_with_another_vocabulary_is_refused_at_the_start() -> None:
    swapped = TOY_LETTERS[1] + TOY_LETTERS[0] + TOY_LETTERS[2:]
    with pytest.raises(ModelMismatch) as caught:
        async with running_stack([ScriptedTarget()], [ScriptedDrafter(tokenizer_json=toy_tokenizer_json(swapped))]):
            pass

    for part in ("toy-target", "toy-draft", "id 1", "'a'", "'b'"):
        assert part in caught.value.message


async def test_drafter_with_another_vocabulary_is_not_used_when_it_comes_later() -> None:
    swapped = TOY_LETTERS[1] + TOY_LETTERS[0] + TOY_LETTERS[2:]
    async with running_stack([ScriptedTarget()], [ScriptedDrafter()]) as stack:
        [draft] = stack.drafts
        await draft.kill()
        await eventually(lambda: stack.coordinator.deployment().num_drafters == 0, "the loss noticed")
        draft.core = ScriptedDrafter(name="other", tokenizer_json=toy_tokenizer_json(swapped))
        await draft.start()
        await eventually(lambda: "vocabular" in stack.coordinator.problems().get(draft.address, ""), "the refusal")

        answer = await generate(stack, generate_request())

        assert answer.token_ids == spoken(PROMPT, 40)
        assert draft.core.commands == []


async def test_targets_must_serve_the_same_model() -> None:
    with pytest.raises(ModelMismatch, match="other"):
        async with running_stack([ScriptedTarget(), ScriptedTarget(name="other")]):
            pass


async def test_start_waits_for_the_target_and_tells_what_for() -> None:
    progress: list[str] = []
    async with running_worker(ScriptedTarget()) as target:
        await target.kill()
        coordinator = make_coordinator(CoordinatorSettings(targets=[target.address]))
        starting = asyncio.create_task(coordinator.start(progress.append))
        await eventually(lambda: len(progress) >= 2, "progress told")
        assert not starting.done()
        assert target.address in progress[-1]
        with pytest.raises(Unavailable):
            coordinator.deployment()
        await target.start()
        await starting
        await coordinator.close()
