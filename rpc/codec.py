"""Translation between ``speculation.messages`` and the frames on the wire.

Runs once per frame in every process, so each direction is one pass over the items. Decoding never raises on odd
values: whoever receives a message checks them. Of a proposal's lists no more is read than a valid one may have, and one
too many of what would make it invalid: a drafter is not trusted, and a list of millions takes seconds. An item whose
oneof is unset, or that a newer peer has and this build does not know, is skipped; an unknown error code reads as
INTERNAL, an unknown finish reason as LENGTH (the session is over, and not by a stop token known here).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from protos import common_pb2, draft_pb2, target_pb2
from speculation.draft_distribution import MAX_DRAFT_TOP_N, DraftDistribution
from speculation.messages import (
    MAX_PROPOSAL_TOKENS,
    NOTHING_HEARD,
    ChatTemplate,
    CloseSession,
    Commit,
    DraftCommand,
    DraftEvent,
    FinishReason,
    Grammar,
    Heard,
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
    TargetCommand,
    TargetEvent,
    TargetFrame,
    TokenLogprobs,
    Verdict,
)

TargetCommandItems: TypeAlias = Sequence[tuple[SessionId, TargetCommand]]
DraftCommandItems: TypeAlias = Sequence[tuple[SessionId, DraftCommand]]
DraftFrame: TypeAlias = Sequence[tuple[SessionId, DraftEvent]]
"""What a draft worker sends after one step."""

# -- parts that both workers share --------------------------------------------------------------------------------


_METHOD_TO_PROTO: Mapping[Method, common_pb2.Method.ValueType] = {
    Method.COUPLED: common_pb2.COUPLED,
    Method.REJECTION: common_pb2.REJECTION,
    Method.BLOCK: common_pb2.BLOCK,
}
_METHOD_FROM_PROTO: Mapping[int, Method] = {value: key for key, value in _METHOD_TO_PROTO.items()}


def sampling_to_proto(sampling: Sampling) -> common_pb2.Sampling:
    grammar = sampling.grammar
    return common_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        method=_METHOD_TO_PROTO[sampling.method],
        draft_top_n=sampling.draft_top_n,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=[common_pb2.TokenBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
        bad_words=[common_pb2.TokenSequence(token_ids=token_ids) for token_ids in sampling.bad_words],
        min_length=sampling.min_length,
        prompt_length=sampling.prompt_length,
        grammar=None if grammar is None else common_pb2.Grammar(kind=grammar.kind, text=grammar.text),
    )


def sampling_from_proto(message: common_pb2.Sampling) -> Sampling:
    grammar = Grammar(message.grammar.kind, message.grammar.text) if message.HasField("grammar") else None
    return Sampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed,
        method=_METHOD_FROM_PROTO.get(message.method, Method.UNKNOWN),
        draft_top_n=message.draft_top_n,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty or 1.0,  # a peer that does not know it sends 0
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple((item.token_id, item.bias) for item in message.logit_bias),
        bad_words=tuple(tuple(item.token_ids) for item in message.bad_words),
        min_length=message.min_length,
        prompt_length=message.prompt_length,
        grammar=grammar,
    )


def logprobs_to_proto(logprobs: TokenLogprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def _logprobs_from_proto(message: common_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, tuple(zip(message.top_token_ids, message.top_logprobs, strict=False)))


def model_info_to_proto(info: ModelInfo) -> common_pb2.ModelInfo:
    return common_pb2.ModelInfo(
        name=info.name,
        vocab_size=info.vocab_size,
        max_context=info.max_context,
        eos_token_ids=info.eos_token_ids,
        num_parameters=info.num_parameters,
        dtype=info.dtype,
        device=info.device,
        tokenizer_sha256=info.tokenizer_sha256,
        tokenizer_size=info.tokenizer_size,
        chat_template=_chat_template_to_proto(info.chat_template),
    )


def model_info_from_proto(message: common_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        vocab_size=message.vocab_size,
        max_context=message.max_context,
        eos_token_ids=tuple(message.eos_token_ids),
        num_parameters=message.num_parameters,
        dtype=message.dtype,
        device=message.device,
        tokenizer_sha256=message.tokenizer_sha256,
        tokenizer_size=message.tokenizer_size,
        chat_template=_chat_template_from_proto(message.chat_template) if message.HasField("chat_template") else None,
    )


def _chat_template_to_proto(template: ChatTemplate | None) -> common_pb2.ChatTemplate | None:
    if template is None:
        return None
    return common_pb2.ChatTemplate(source=template.source, special_tokens=dict(template.special_tokens))


def _chat_template_from_proto(message: common_pb2.ChatTemplate) -> ChatTemplate:
    return ChatTemplate(message.source, tuple(sorted(message.special_tokens.items())))


def _proposal_to_proto(proposal: Proposal) -> common_pb2.Proposal:
    return common_pb2.Proposal(
        prefix_length=proposal.prefix_length,
        prefix_fingerprint=proposal.prefix_fingerprint,
        token_ids=proposal.token_ids,
        confidences=proposal.confidences,
        is_branch=proposal.is_branch,
        distributions=[
            common_pb2.DraftDistribution(token_ids=distribution.token_ids, weights=distribution.weights)
            for distribution in proposal.distributions
        ],
        num_committed=proposal.num_committed,
        held_s=proposal.held_s,
    )


def _proposal_from_proto(message: common_pb2.Proposal) -> Proposal:
    return Proposal(
        message.prefix_length,
        message.prefix_fingerprint,
        tuple(message.token_ids[: MAX_PROPOSAL_TOKENS + 1]),
        tuple(message.confidences[:MAX_PROPOSAL_TOKENS]),
        message.is_branch,
        tuple(
            DraftDistribution(
                tuple(distribution.token_ids[: MAX_DRAFT_TOP_N + 1]), tuple(distribution.weights[: MAX_DRAFT_TOP_N + 1])
            )
            for distribution in message.distributions[:MAX_PROPOSAL_TOKENS]
        ),
        message.num_committed,
        message.held_s,
    )


_ERROR_CODES: Mapping[int, SessionErrorCode] = {
    common_pb2.SessionError.Code.Value(code.value): code for code in SessionErrorCode
}


def _error_to_proto(error: SessionError) -> common_pb2.SessionError:
    return common_pb2.SessionError(code=common_pb2.SessionError.Code.Value(error.code.value), message=error.message)


def _error_from_proto(message: common_pb2.SessionError) -> SessionError:
    return SessionError(_ERROR_CODES.get(message.code, SessionErrorCode.INTERNAL), message.message)


_CLOSE = CloseSession()
_CLOSE_PROTO = common_pb2.CloseSession()


# -- coordinator to target ----------------------------------------------------------------------------------------


def target_commands_to_proto(items: TargetCommandItems, heard: Heard = NOTHING_HEARD) -> target_pb2.TargetCommands:
    """A frame of commands. Raises ValueError on values that do not fit the wire's integers."""
    return target_pb2.TargetCommands(
        items=[_target_command_to_proto(id_, command) for id_, command in items],
        num_heard=heard.num_frames,
        held_s=heard.held_s,
    )


def _target_command_to_proto(session_id: SessionId, command: TargetCommand) -> target_pb2.TargetCommand:
    message = target_pb2.TargetCommand
    match command:
        case Proposal():
            return message(session_id=session_id, proposal=_proposal_to_proto(command))
        case SetK():
            return message(session_id=session_id, set_k=target_pb2.SetK(k=command.k))
        case OpenTarget():
            return message(session_id=session_id, open=_open_target_to_proto(command))
        case CloseSession():
            return message(session_id=session_id, close=_CLOSE_PROTO)


def _open_target_to_proto(command: OpenTarget) -> target_pb2.OpenTarget:
    return target_pb2.OpenTarget(
        token_ids=command.token_ids,
        sampling=sampling_to_proto(command.sampling),
        max_length=command.max_length,
        stop_token_ids=command.stop_token_ids,
        k=command.k,
        turns=command.turns,
        logprobs=None if command.logprobs is None else _logprob_options_to_proto(command.logprobs),
        prompt_logprobs=command.prompt_logprobs,
        fork_of=command.fork_of,
        trace_context=command.trace_context,
        max_lookup=command.max_lookup,
    )


def _logprob_options_to_proto(options: LogprobOptions) -> target_pb2.LogprobOptions:
    return target_pb2.LogprobOptions(num_top=options.num_top, processed=options.processed)


def target_commands_from_proto(message: target_pb2.TargetCommands) -> list[tuple[SessionId, TargetCommand]]:
    return [
        (SessionId(item.session_id), command)
        for item in message.items
        if (command := _target_command_from_proto(item)) is not None
    ]


def heard_from_proto(message: target_pb2.TargetCommands) -> Heard:
    return Heard(message.num_heard, message.held_s)


def _target_command_from_proto(item: target_pb2.TargetCommand) -> TargetCommand | None:
    match item.WhichOneof("command"):
        case "proposal":
            return _proposal_from_proto(item.proposal)
        case "set_k":
            return SetK(item.set_k.k)
        case "open":
            return _open_target_from_proto(item.open)
        case "close":
            return _CLOSE
        case _:
            return None


def _open_target_from_proto(message: target_pb2.OpenTarget) -> OpenTarget:
    return OpenTarget(
        token_ids=tuple(message.token_ids),
        sampling=sampling_from_proto(message.sampling),
        max_length=message.max_length,
        stop_token_ids=tuple(message.stop_token_ids),
        k=message.k,
        turns=message.turns,
        logprobs=(
            LogprobOptions(message.logprobs.num_top, message.logprobs.processed)
            if message.HasField("logprobs")
            else None
        ),
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        fork_of=SessionId(message.fork_of),
        trace_context=message.trace_context,
        max_lookup=message.max_lookup,
    )


# -- target to coordinator ----------------------------------------------------------------------------------------

_FINISH_TO_PROTO: Mapping[FinishReason | None, target_pb2.FinishReason.ValueType] = {
    None: target_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: target_pb2.STOP,
    FinishReason.LENGTH: target_pb2.LENGTH,
}
_FINISH_FROM_PROTO: Mapping[int, FinishReason | None] = {value: key for key, value in _FINISH_TO_PROTO.items()}


def target_frame_to_proto(frame: TargetFrame) -> target_pb2.TargetEvents:
    """A frame of verdicts and errors. Raises ValueError on values that do not fit the wire's integers."""
    items = [_target_event_to_proto(session_id, event) for session_id, event in frame.items]
    step = None if frame.step is None else _step_to_proto(frame.step)
    return target_pb2.TargetEvents(
        items=items,
        step=step,
        gather_s=frame.gather_s,
        num_heard=frame.num_heard,
        drafts_at_once=frame.drafts_at_once,
    )


def _target_event_to_proto(session_id: SessionId, event: TargetEvent) -> target_pb2.TargetEvent:
    if isinstance(event, Verdict):
        return target_pb2.TargetEvent(session_id=session_id, verdict=_verdict_to_proto(event))
    return target_pb2.TargetEvent(session_id=session_id, error=_error_to_proto(event))


def _verdict_to_proto(verdict: Verdict) -> target_pb2.Verdict:
    message = target_pb2.Verdict(
        start=verdict.start,
        token_ids=verdict.token_ids,
        num_drafted=verdict.num_drafted,
        num_accepted=verdict.num_accepted,
        num_staged=verdict.num_staged,
        num_dropped=verdict.num_dropped,
        num_late=verdict.num_late,
        num_late_right=verdict.num_late_right,
        missed=verdict.missed,
        caught=verdict.caught,
        finish_reason=_FINISH_TO_PROTO[verdict.finish_reason],
        num_looked_up=verdict.num_looked_up,
        num_looked_up_accepted=verdict.num_looked_up_accepted,
    )
    if verdict.logprobs:  # hardly ever there, and empty lists cost as much as the rest
        message.logprobs.extend(map(logprobs_to_proto, verdict.logprobs))
    if verdict.prompt_logprobs:
        message.prompt_logprobs.extend(map(logprobs_to_proto, verdict.prompt_logprobs))
    return message


def _step_to_proto(step: StepReport) -> target_pb2.StepReport:
    return target_pb2.StepReport(
        step_s=step.step_s, num_sessions=step.num_sessions, num_tokens=step.num_tokens, waited_s=step.waited_s
    )


def target_frame_from_proto(message: target_pb2.TargetEvents) -> TargetFrame:
    items = tuple(
        (SessionId(item.session_id), event)
        for item in message.items
        if (event := _target_event_from_proto(item)) is not None
    )
    step = _step_from_proto(message.step) if message.HasField("step") else None
    return TargetFrame(items, step, message.gather_s, message.num_heard, message.drafts_at_once)


def _target_event_from_proto(item: target_pb2.TargetEvent) -> TargetEvent | None:
    match item.WhichOneof("event"):
        case "verdict":
            return _verdict_from_proto(item.verdict)
        case "error":
            return _error_from_proto(item.error)
        case _:
            return None


def _verdict_from_proto(message: target_pb2.Verdict) -> Verdict:
    return Verdict(
        message.start,
        tuple(message.token_ids),
        message.num_drafted,
        message.num_accepted,
        message.num_staged,
        message.num_dropped,
        _FINISH_FROM_PROTO.get(message.finish_reason, FinishReason.LENGTH),
        message.num_late,
        message.num_late_right,
        message.missed,
        message.caught,
        tuple(map(_logprobs_from_proto, message.logprobs)),
        tuple(map(_logprobs_from_proto, message.prompt_logprobs)),
        message.num_looked_up,
        message.num_looked_up_accepted,
    )


def _step_from_proto(message: target_pb2.StepReport) -> StepReport:
    return StepReport(message.step_s, message.num_sessions, message.num_tokens, message.waited_s)


# -- coordinator to drafter ---------------------------------------------------------------------------------------


def draft_commands_to_proto(items: DraftCommandItems) -> draft_pb2.DraftCommands:
    """A frame of commands. Raises ValueError on values that do not fit the wire's integers."""
    return draft_pb2.DraftCommands(items=[_draft_command_to_proto(id_, command) for id_, command in items])


def _draft_command_to_proto(session_id: SessionId, command: DraftCommand) -> draft_pb2.DraftCommand:
    message = draft_pb2.DraftCommand
    match command:
        case Commit():
            commit = draft_pb2.Commit(start=command.start, token_ids=command.token_ids, gather_s=command.gather_s)
            return message(session_id=session_id, commit=commit)
        case SetLookahead():
            lookahead = draft_pb2.SetLookahead(lookahead=command.lookahead)
            return message(session_id=session_id, set_lookahead=lookahead)
        case OpenDraft():
            return message(session_id=session_id, open=_open_draft_to_proto(command))
        case CloseSession():
            return message(session_id=session_id, close=_CLOSE_PROTO)


def _open_draft_to_proto(command: OpenDraft) -> draft_pb2.OpenDraft:
    return draft_pb2.OpenDraft(
        token_ids=command.token_ids,
        sampling=sampling_to_proto(command.sampling),
        lookahead=command.lookahead,
        max_length=command.max_length,
        max_branches=command.max_branches,
        stop_token_ids=command.stop_token_ids,
        trace_context=command.trace_context,
    )


def draft_commands_from_proto(message: draft_pb2.DraftCommands) -> list[tuple[SessionId, DraftCommand]]:
    return [
        (SessionId(item.session_id), command)
        for item in message.items
        if (command := _draft_command_from_proto(item)) is not None
    ]


def _draft_command_from_proto(item: draft_pb2.DraftCommand) -> DraftCommand | None:
    match item.WhichOneof("command"):
        case "commit":
            return Commit(item.commit.start, tuple(item.commit.token_ids), item.commit.gather_s)
        case "set_lookahead":
            return SetLookahead(item.set_lookahead.lookahead)
        case "open":
            return _open_draft_from_proto(item.open)
        case "close":
            return _CLOSE
        case _:
            return None


def _open_draft_from_proto(message: draft_pb2.OpenDraft) -> OpenDraft:
    return OpenDraft(
        token_ids=tuple(message.token_ids),
        sampling=sampling_from_proto(message.sampling),
        lookahead=message.lookahead,
        max_length=message.max_length,
        max_branches=message.max_branches,
        stop_token_ids=tuple(message.stop_token_ids),
        trace_context=message.trace_context,
    )


# -- drafter to coordinator ---------------------------------------------------------------------------------------


def draft_frame_to_proto(frame: DraftFrame) -> draft_pb2.DraftEvents:
    """A frame of proposals and errors. Raises ValueError on values that do not fit the wire's integers."""
    return draft_pb2.DraftEvents(items=[_draft_event_to_proto(session_id, event) for session_id, event in frame])


def _draft_event_to_proto(session_id: SessionId, event: DraftEvent) -> draft_pb2.DraftEvent:
    if isinstance(event, Proposal):
        return draft_pb2.DraftEvent(session_id=session_id, proposal=_proposal_to_proto(event))
    return draft_pb2.DraftEvent(session_id=session_id, error=_error_to_proto(event))


def draft_frame_from_proto(message: draft_pb2.DraftEvents) -> DraftFrame:
    return tuple(
        (SessionId(item.session_id), event)
        for item in message.items
        if (event := _draft_event_from_proto(item)) is not None
    )


def _draft_event_from_proto(item: draft_pb2.DraftEvent) -> DraftEvent | None:
    match item.WhichOneof("event"):
        case "proposal":
            return _proposal_from_proto(item.proposal)
        case "error":
            return _error_from_proto(item.error)
        case _:
            return None
