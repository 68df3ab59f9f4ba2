"""Whatever goes over the wire comes back the same; odd frames are read without an error."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from protos import common_pb2, draft_pb2, target_pb2
from rpc import draft_codec, shared_codec, target_codec
from speculation.draft_distribution import DraftDistribution
from speculation.messages import (
    CloseSession,
    Commit,
    FinishReason,
    Grammar,
    LogprobOptions,
    Method,
    ModelInfo,
    OpenDraft,
    OpenTarget,
    Proposal,
    Sampling,
    SessionError,
    SessionErrorCode,
    SessionId,
    SetK,
    SetLookahead,
    StepReport,
    TargetFrame,
    TokenLogprobs,
    Verdict,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
tokens = st.lists(u32, max_size=6).map(tuple)
seconds = st.floats(0, 1e6)
methods = st.sampled_from([method for method in Method if method is not Method.UNKNOWN])
float32 = st.floats(-100, 100, width=32)
sampling = st.builds(
    Sampling,
    st.floats(0, 10),
    u32,
    st.floats(0, 1),
    u64,
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.lists(st.tuples(u32, float32), max_size=3).map(tuple),
    bad_words=st.lists(tokens, max_size=3).map(tuple),
    min_length=u32,
    prompt_length=u32,
    grammar=st.none() | st.builds(Grammar, st.text(max_size=5), st.text(max_size=20)),
    method=methods,
    draft_top_n=u32,
)
logprobs = st.builds(TokenLogprobs, float32, st.lists(st.tuples(u32, float32), max_size=3).map(tuple))
confidences = st.lists(st.floats(0, 1, width=32), max_size=6).map(tuple)
distributions = st.lists(st.builds(DraftDistribution, tokens, tokens), max_size=3).map(tuple)
proposal = st.builds(Proposal, u32, u64, tokens, confidences, st.booleans(), distributions)
error = st.builds(SessionError, st.sampled_from(SessionErrorCode), st.text(max_size=20))
close = st.just(CloseSession())
verdict = st.builds(
    Verdict,
    *(u32, tokens, u32, u32, u32, u32, st.sampled_from([None, *FinishReason]), u32, u32),
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
    prompt_logprobs=st.lists(logprobs, max_size=3).map(tuple),
)
model_info = st.builds(ModelInfo, st.text(), u32, u32, tokens, u64, st.text(), st.text(), st.binary(), u32)


def frame(*items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(st.tuples(u64, st.one_of(*items)), max_size=5).map(tuple)


context = st.text(max_size=55)
open_target = st.builds(
    OpenTarget,
    *(tokens, sampling, u32, tokens, u32, st.booleans()),
    logprobs=st.none() | st.builds(LogprobOptions, u32, st.booleans()),
    prompt_logprobs=st.none() | u32,
    fork_of=u64,
    trace_context=context,
)
target_command = frame(open_target, proposal, st.builds(SetK, u32), close)
draft_command = frame(
    st.builds(OpenDraft, tokens, sampling, u32, u32, u32, tokens, trace_context=context),
    st.builds(Commit, u32, tokens),
    st.builds(SetLookahead, u32),
    close,
)
step = st.none() | st.builds(StepReport, seconds, u32, u32, seconds)


@given(target_command)
def test_target_commands(items: Any) -> None:
    data = target_codec.target_commands_to_proto(items).SerializeToString()
    assert tuple(target_codec.target_commands_from_proto(target_pb2.TargetCommands.FromString(data))) == items


@given(draft_command)
def test_draft_commands(items: Any) -> None:
    data = draft_codec.draft_commands_to_proto(items).SerializeToString()
    assert tuple(draft_codec.draft_commands_from_proto(draft_pb2.DraftCommands.FromString(data))) == items


@given(st.builds(TargetFrame, frame(verdict, error), step, st.floats(0, 1, width=32), u32, st.booleans()))
def test_target_frames(sent: TargetFrame) -> None:
    data = target_codec.target_frame_to_proto(sent).SerializeToString()
    assert target_codec.target_frame_from_proto(target_pb2.TargetEvents.FromString(data)) == sent


@given(frame(proposal, error))
def test_draft_frames(items: Any) -> None:
    data = draft_codec.draft_frame_to_proto(items).SerializeToString()
    assert draft_codec.draft_frame_from_proto(draft_pb2.DraftEvents.FromString(data)) == items


@given(model_info)
def test_model_info(info: ModelInfo) -> None:
    data = shared_codec.model_info_to_proto(info).SerializeToString()
    assert shared_codec.model_info_from_proto(common_pb2.ModelInfo.FromString(data)) == info


def test_items_without_content_are_skipped() -> None:
    commands = target_pb2.TargetCommands(
        items=[
            target_pb2.TargetCommand(session_id=1),
            target_pb2.TargetCommand(session_id=2, set_k=target_pb2.SetK(k=3)),
        ]
    )
    assert target_codec.target_commands_from_proto(commands) == [(SessionId(2), SetK(3))]
    assert draft_codec.draft_commands_from_proto(draft_pb2.DraftCommands(items=[draft_pb2.DraftCommand()])) == []
    assert target_codec.target_frame_from_proto(
        target_pb2.TargetEvents(items=[target_pb2.TargetEvent()])
    ) == TargetFrame(())
    assert draft_codec.draft_frame_from_proto(draft_pb2.DraftEvents(items=[draft_pb2.DraftEvent()])) == ()


def test_a_method_of_a_newer_peer() -> None:
    message = common_pb2.Sampling(temperature=1.0)
    message.method = 99  # type: ignore[assignment]
    assert shared_codec.sampling_from_proto(message).method is Method.UNKNOWN


def test_bytes_of_q_are_counted_as_the_wire_has_them() -> None:
    distribution = DraftDistribution((1, 300, 70_000), (1, 35, 65_500))
    message = common_pb2.DraftDistribution(token_ids=distribution.token_ids, weights=distribution.weights)
    framing = 2 * 2  # a tag and a length for each of the two lists
    assert len(message.SerializeToString()) == distribution.num_bytes + framing


def test_codes_of_a_newer_peer() -> None:
    events = target_pb2.TargetEvents()
    events.items.add(session_id=1).error.code = 99  # type: ignore[assignment]
    events.items.add(session_id=2).verdict.finish_reason = 99  # type: ignore[assignment]

    [(_, failure), (_, verdict)] = target_codec.target_frame_from_proto(events).items

    assert isinstance(failure, SessionError)
    assert failure.code is SessionErrorCode.INTERNAL
    assert isinstance(verdict, Verdict)
    assert verdict.finish_reason is FinishReason.LENGTH
