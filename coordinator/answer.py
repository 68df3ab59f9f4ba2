"""One choice of a request as its client sees it: tokens with text and logprobs, and why it ended.

The target ends an answer at a stop token or at its greatest length. Stop strings are found here, where the text is; the
session is then closed at its workers, and what they have decided beyond is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from coordinator.detokenizer import Detokenizer
from coordinator.events import FinishedEvent, Timing, TokenPiece, TokensEvent
from coordinator.session import Session
from coordinator.stop_strings import StopStringSearch
from speculation.messages import FinishReason, TokenId
from speculation.relay import Emit
from speculation.speedup import estimated_speedup


class Answer:
    """Turns what a session emits into events."""

    def __init__(
        self,
        session: Session,
        choice: int,
        detokenizer: Detokenizer,
        plain_step_s: Callable[[Session], float | None],
    ) -> None:
        """``plain_step_s``: seconds of a step of plain decoding of all sessions that the target has, if known."""
        job = session.job
        self.session = session
        self.is_over = False
        """`take` has returned the `FinishedEvent`."""
        self._choice = choice
        self._plain_step_s = plain_step_s
        self._detokenizer = detokenizer
        self._search = StopStringSearch(job.stop.strings, job.stop.keeps_stop)
        self._min_tokens = job.stop.min_tokens
        self._silent_token_ids = frozenset() if job.stop.keeps_stop else frozenset(job.stop_token_ids)
        self._num_tokens = 0
        self._last_token_id: TokenId | None = None
        self._stop_string: str | None = None

    def take(self) -> list[TokensEvent | FinishedEvent]:
        """Everything new, perhaps nothing. Raises the error that the session failed with."""
        events: list[TokensEvent | FinishedEvent] = []
        for emit in self.session.take():
            events.append(self._tokens_event(emit))
            if self._stop_string is not None:
                self.session.stop()
                break
        if self.session.is_read:
            events += self._end()
        return events

    def _tokens_event(self, emit: Emit) -> TokensEvent:
        pieces = []
        num_guessed = emit.num_accepted + emit.num_looked_up_accepted
        for index, token_id in enumerate(emit.token_ids):
            logprobs = emit.logprobs[index] if emit.logprobs else None
            drafted, looked_up = index < emit.num_accepted, emit.num_accepted <= index < num_guessed
            pieces.append(TokenPiece(token_id, self._text_of(token_id), drafted, logprobs, looked_up))
            if self._stop_string is not None:
                break
        text = "".join([piece.text for piece in pieces])
        traces = self.session.traces
        trace = None if traces is None else traces.take()
        return TokensEvent(text, tuple(pieces), emit.num_drafted, emit.k, self._choice, trace, emit.num_looked_up)

    def _text_of(self, token_id: TokenId) -> str:
        """What may be given out now that this token is there."""
        self._num_tokens += 1
        self._last_token_id = token_id
        if token_id in self._silent_token_ids:
            return ""
        counts = self._num_tokens > self._min_tokens
        text, self._stop_string = self._search.push(self._detokenizer.push(token_id), counts)
        return text

    def _end(self) -> list[TokensEvent | FinishedEvent]:
        """The rest of the text, and the last event."""
        self.is_over = True
        rest = ""
        if self._stop_string is None:
            rest, self._stop_string = self._search.push(self._detokenizer.flush())
            if self._stop_string is None:
                rest += self._search.flush()
            else:
                self.session.stop()
        finished = self._finished_event()
        if not rest:
            return [finished]
        return [TokensEvent(rest, (), 0, self.session.stats.last_k, self._choice), finished]

    def _finished_event(self) -> FinishedEvent:
        session, reason = self.session, self.session.finish_reason
        assert reason is not None
        return FinishedEvent(
            finish_reason=reason,
            num_prompt_tokens=len(session.job.prompt_token_ids),
            num_completion_tokens=self._num_tokens,
            stats=session.stats,
            policy=session.job.policy or "off",
            timing=Timing(
                queue_s=session.placed_s - session.arrived_s,
                first_token_s=session.first_token_s - session.arrived_s,
                total_s=session.over_s - session.arrived_s,
            ),
            choice=self._choice,
            stop_reason=self._stop_reason(reason),
            estimated_speedup=self._estimated_speedup(),
        )

    def _estimated_speedup(self) -> float:
        session = self.session
        if session.job.policy is None:
            return 0.0
        decode_s = session.over_s - session.first_token_s
        return estimated_speedup(session.stats.num_committed, decode_s, self._plain_step_s(session))

    def _stop_reason(self, reason: FinishReason) -> str | TokenId | None:
        if self._stop_string is not None:
            return self._stop_string
        is_own = reason is FinishReason.STOP and self._last_token_id in self.session.job.stop.token_ids
        return self._last_token_id if is_own else None


async def merged(answers: Sequence[Answer], changed: asyncio.Event) -> AsyncIterator[TokensEvent | FinishedEvent]:
    """The events of all answers as they come; ``changed`` is set whenever one of their sessions has news."""
    under_way = list(answers)
    while under_way:
        changed.clear()
        had_news = False
        for answer in under_way:
            for event in answer.take():
                had_news = True
                yield event
        under_way = [answer for answer in under_way if not answer.is_over]
        if not had_news:  # a session that has failed says so only when all else is taken
            await changed.wait()
