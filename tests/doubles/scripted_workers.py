"""A target and a drafter whose models are pure functions, over the project's own session cores: no thread, no torch.

Both are `rpc.worker_core.WorkerCore`s: put them behind a servicer, or into `coordinator.in_process`.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rpc.draft_codec import DraftFrame
from speculation.drafter import DrafterSession
from speculation.experience import Experience
from speculation.messages import (
    NOTHING_HEARD,
    CloseSession,
    Commit,
    DraftCommand,
    Heard,
    ModelInfo,
    OpenDraft,
    OpenTarget,
    Proposal,
    SessionError,
    SessionErrorCode,
    SessionId,
    SetK,
    SetLookahead,
    StepReport,
    TargetCommand,
    TargetEvent,
    TargetFrame,
    TokenId,
    TokenLogprobs,
)
from speculation.verifier import VerifierSession
from tests.doubles.toy_drafter import draft_with_toy
from tests.doubles.toy_model import STOP_TOKEN, VOCAB_SIZE, next_token

CommandT = TypeVar("CommandT")
FrameT = TypeVar("FrameT")
SessionT = TypeVar("SessionT")

TOY_LETTERS = "abcdefghij"
"""Text of the toy model's tokens 1 .. 10; token 0 is the end-of-text token."""


def toy_tokenizer_json(letters: str = TOY_LETTERS) -> bytes:
    """A byte-level tokenizer.json in which token ``i + 1`` is ``letters[i]``."""
    vocabulary = {"<eos>": STOP_TOKEN, **{letter: index + 1 for index, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer.to_str().encode()


def toy_model_info(name: str, tokenizer_json: bytes, max_context: int = 4096) -> ModelInfo:
    size = Tokenizer.from_buffer(tokenizer_json).get_vocab_size()
    digest = hashlib.sha256(tokenizer_json).digest()
    return ModelInfo(name, VOCAB_SIZE, max_context, (STOP_TOKEN,), 1000, "float32", "cpu", digest, size)


class _ScriptedWorker(Generic[CommandT, FrameT, SessionT]):
    """Connections, sessions and a clock: a turn every ``turn_s`` while there is anything to do."""

    def __init__(self, info: ModelInfo, tokenizer_json: bytes, turn_s: float) -> None:
        self.model_info = info
        self.tokenizer_json = tokenizer_json
        self.num_turns = 0
        self.commands: list[CommandT] = []
        self.connections: list[_ScriptedConnection[CommandT, FrameT, SessionT]] = []
        self._turn_s = turn_s
        self._turns_left: int | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_sessions(self) -> int:
        return sum(len(connection.sessions) for connection in self.connections)

    def hold(self, num_turns: int = 0) -> None:
        """Takes only so many turns more until `release`."""
        self._turns_left = num_turns
        self.wake()

    def release(self) -> None:
        self._turns_left = None
        self.wake()

    def connect(self, deliver: Callable[[FrameT], None]) -> _ScriptedConnection[CommandT, FrameT, SessionT]:
        connection = _ScriptedConnection(self, deliver)
        self.connections.append(connection)
        return connection

    def wake(self) -> None:
        if self._timer is None and self._turns_left != 0 and any(map(self.has_work, self.connections)):
            self._timer = asyncio.get_running_loop().call_later(self._turn_s, self._turn)

    def _turn(self) -> None:
        self._timer = None
        self.num_turns += 1
        if self._turns_left is not None:
            self._turns_left -= 1
        for connection in self.connections:
            frame = self.step(connection) if self.has_work(connection) else None
            if frame is not None:
                connection.deliver(frame)
        self.wake()

    def has_work(self, connection: _ScriptedConnection[CommandT, FrameT, SessionT]) -> bool:
        raise NotImplementedError

    def step(self, connection: _ScriptedConnection[CommandT, FrameT, SessionT]) -> FrameT | None:
        raise NotImplementedError

    def apply(
        self,
        connection: _ScriptedConnection[CommandT, FrameT, SessionT],
        items: Sequence[tuple[SessionId, CommandT]],
    ) -> None:
        raise NotImplementedError


class _ScriptedConnection(Generic[CommandT, FrameT, SessionT]):
    def __init__(self, worker: _ScriptedWorker[CommandT, FrameT, SessionT], deliver: Callable[[FrameT], None]) -> None:
        self.sessions: dict[SessionId, SessionT] = {}
        self.deliver = deliver
        self._worker = worker

    def submit(self, items: Sequence[tuple[SessionId, CommandT]], heard: Heard = NOTHING_HEARD) -> None:
        self._worker.commands.extend(command for _, command in items)
        self._worker.apply(self, items)
        self._worker.wake()

    def close(self) -> None:
        self.sessions.clear()
        if self in self._worker.connections:
            self._worker.connections.remove(self)


class ScriptedTarget(_ScriptedWorker[TargetCommand, TargetFrame, VerifierSession]):
    """Says ``next_token(prefix)``, whatever is proposed."""

    def __init__(self, name: str = "toy-target", tokenizer_json: bytes | None = None, turn_s: float = 0.005) -> None:
        tokenizer_json = tokenizer_json or toy_tokenizer_json()
        super().__init__(toy_model_info(name, tokenizer_json), tokenizer_json, turn_s)
        self.fail_next_open: SessionError | None = None

    def has_work(self, connection: _ScriptedConnection[TargetCommand, TargetFrame, VerifierSession]) -> bool:
        return bool(connection.sessions)

    def apply(
        self,
        connection: _ScriptedConnection[TargetCommand, TargetFrame, VerifierSession],
        items: Sequence[tuple[SessionId, TargetCommand]],
    ) -> None:
        errors: list[tuple[SessionId, TargetEvent]] = []
        for session_id, command in items:
            session = connection.sessions.get(session_id)
            if isinstance(command, OpenTarget):
                if self.fail_next_open is not None:
                    errors.append((session_id, self.fail_next_open))
                    self.fail_next_open = None
                else:
                    connection.sessions[session_id] = VerifierSession(command, VOCAB_SIZE, Experience(lookups=None))
            elif isinstance(command, CloseSession):
                connection.sessions.pop(session_id, None)
            elif session is None:
                continue  # crossed with the verdict that ended it
            elif isinstance(command, SetK):
                session.set_k(command.k)
            else:
                session.stage(command, time.monotonic())
        if errors:
            connection.deliver(TargetFrame(tuple(errors)))

    def step(self, connection: _ScriptedConnection[TargetCommand, TargetFrame, VerifierSession]) -> TargetFrame:
        items: list[tuple[SessionId, TargetEvent]] = []
        num_tokens = 0
        for session_id, session in list(connection.sessions.items()):
            drafted = session.drafted(session.k)
            num_tokens += 1 + len(drafted)
            prefix = list(session.token_ids)
            draws = [next_token([*prefix, *drafted[:index]]) for index in range(len(drafted) + 1)]
            verdict = session.conclude(drafted, draws, time.monotonic())
            if session.logprobs is not None:
                verdict = replace(verdict, logprobs=tuple(map(_toy_logprobs, verdict.token_ids)))
            items.append((session_id, verdict))
            if verdict.finish_reason is not None:
                del connection.sessions[session_id]
        return TargetFrame(tuple(items), StepReport(self._turn_s, len(items), num_tokens))


def _toy_logprobs(token_id: TokenId) -> TokenLogprobs:
    """Three in four for the token, one in eight for the next one."""
    return TokenLogprobs(math.log(0.75), ((token_id, math.log(0.75)), ((token_id + 1) % VOCAB_SIZE, math.log(0.125))))


class ScriptedDrafter(_ScriptedWorker[DraftCommand, DraftFrame, DrafterSession]):
    """Guesses the target's token in ``percent_right`` of the prefixes; drafts up to the lookahead in one turn."""

    def __init__(
        self,
        name: str = "toy-draft",
        tokenizer_json: bytes | None = None,
        turn_s: float = 0.0005,
        percent_right: int = 80,
    ) -> None:
        tokenizer_json = tokenizer_json or toy_tokenizer_json()
        super().__init__(toy_model_info(name, tokenizer_json), tokenizer_json, turn_s)
        self._percent_right = percent_right

    def has_work(self, connection: _ScriptedConnection[DraftCommand, DraftFrame, DrafterSession]) -> bool:
        return any(any(True for _ in session.growths()) for session in connection.sessions.values())

    def apply(
        self,
        connection: _ScriptedConnection[DraftCommand, DraftFrame, DrafterSession],
        items: Sequence[tuple[SessionId, DraftCommand]],
    ) -> None:
        for session_id, command in items:
            session = connection.sessions.get(session_id)
            if isinstance(command, OpenDraft):
                connection.sessions[session_id] = DrafterSession(command, VOCAB_SIZE, self.model_info.max_context)
            elif isinstance(command, CloseSession):
                connection.sessions.pop(session_id, None)
            elif session is None:
                continue
            elif isinstance(command, Commit):
                session.commit(command)
            elif isinstance(command, SetLookahead):
                session.set_lookahead(command.lookahead)

    def step(self, connection: _ScriptedConnection[DraftCommand, DraftFrame, DrafterSession]) -> DraftFrame | None:
        frame: list[tuple[SessionId, Proposal]] = []
        for session_id, session in connection.sessions.items():
            while (growth := next(session.growths(), None)) is not None:
                draft_with_toy(session, session.grow(growth), self._percent_right)
            frame.extend((session_id, proposal) for proposal in session.take_proposals(1))
        return tuple(frame) or None

    def refuse_all(self, message: str = "told to") -> None:
        """Answers every session with an error, as a drafter out of memory does."""
        for connection in self.connections:
            error = SessionError(SessionErrorCode.OUT_OF_MEMORY, message)
            connection.deliver(tuple((session_id, error) for session_id in connection.sessions))
            connection.sessions.clear()
