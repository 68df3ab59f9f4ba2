"""Translation between ``speculation.messages`` and the frames between coordinator and target.

Runs once per frame in both processes, so each direction is one pass over the items. An item whose oneof is unset, or
that a newer peer has and this build does not know, is skipped; an unknown finish reason reads as LENGTH (the session is
over, and not by a stop token known here). As to odd values see `rpc.shared_codec`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from protos import target_pb2
from rpc.shared_codec import (
    CLOSE,
    CLOSE_PROTO,
    error_from_proto,
    error_to_proto,
    fill_proposal,
    logprobs_from_proto,
    logprobs_to_proto,
    proposal_from_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from speculation.messages import (
    NOTHING_HEARD,
    CloseSession,
    FinishReason,
    Heard,
    LogprobOptions,
    OpenTarget,
    Proposal,
    SessionId,
    SetK,
    StepReport,
    TargetCommand,
    TargetEvent,
    TargetFrame,
    Verdict,
)

TargetCommandItems: TypeAlias = Sequence[tuple[SessionId, TargetCommand]]

# -- coordinator to target ----------------------------------------------------------------------------------------


def target_commands_to_proto(items: TargetCommandItems, heard: Heard = NOTHING_HEARD) -> target_pb2.TargetCommands:
    """A frame of commands. Raises ValueError on values that do not fit the wire's integers."""
    message = target_pb2.TargetCommands(num_heard=heard.num_frames, held_s=heard.held_s)
    for session_id, command in items:
        _fill_command(message.items.add(session_id=session_id), command)
    return message


def _fill_command(item: target_pb2.TargetCommand, command: TargetCommand) -> None:
    match command:
        case Proposal():
            fill_proposal(item.proposal, command)
        case SetK():
            item.set_k.CopyFrom(target_pb2.SetK(k=command.k))
        case OpenTarget():
            item.open.CopyFrom(_open_target_to_proto(command))
        case CloseSession():
            item.close.CopyFrom(CLOSE_PROTO)


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
            return proposal_from_proto(item.proposal)
        case "set_k":
            return SetK(item.set_k.k)
        case "open":
            return _open_target_from_proto(item.open)
        case "close":
            return CLOSE
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
    return target_pb2.TargetEvent(session_id=session_id, error=error_to_proto(event))


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
            return error_from_proto(item.error)
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
        tuple(map(logprobs_from_proto, message.logprobs)),
        tuple(map(logprobs_from_proto, message.prompt_logprobs)),
        message.num_looked_up,
        message.num_looked_up_accepted,
    )


def _step_from_proto(message: target_pb2.StepReport) -> StepReport:
    return StepReport(message.step_s, message.num_sessions, message.num_tokens, message.waited_s)
