"""Translation between ``speculation.messages`` and the frames between coordinator and drafter.

What `rpc.target_codec` says of its frames holds here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from protos import draft_pb2
from rpc.shared_codec import (
    CLOSE,
    CLOSE_PROTO,
    error_from_proto,
    error_to_proto,
    fill_proposal,
    proposal_from_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from speculation.messages import (
    CloseSession,
    Commit,
    DraftCommand,
    DraftEvent,
    OpenDraft,
    Proposal,
    SessionId,
    SetLookahead,
)

DraftCommandItems: TypeAlias = Sequence[tuple[SessionId, DraftCommand]]
DraftFrame: TypeAlias = Sequence[tuple[SessionId, DraftEvent]]
"""What a draft worker sends after one step."""

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
            return message(session_id=session_id, close=CLOSE_PROTO)


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
            return CLOSE
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
    message = draft_pb2.DraftEvents()
    for session_id, event in frame:
        item = message.items.add(session_id=session_id)
        if isinstance(event, Proposal):
            fill_proposal(item.proposal, event)
        else:
            item.error.CopyFrom(error_to_proto(event))
    return message


def draft_frame_from_proto(message: draft_pb2.DraftEvents) -> DraftFrame:
    return tuple(
        (SessionId(item.session_id), event)
        for item in message.items
        if (event := _draft_event_from_proto(item)) is not None
    )


def _draft_event_from_proto(item: draft_pb2.DraftEvent) -> DraftEvent | None:
    match item.WhichOneof("event"):
        case "proposal":
            return proposal_from_proto(item.proposal)
        case "error":
            return error_from_proto(item.error)
        case _:
            return None
