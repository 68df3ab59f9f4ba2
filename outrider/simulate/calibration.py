"""What a pair costs on this machine, measured at its own workers, so that it can be simulated.

For hops, draft steps and acceptance the coordinator's place is taken by this process, so a hop is what it is in
service: gRPC, event loop and the worker's thread. What verify steps cost is seen in service itself. Everything is
measured twice, with one model at work at a time, as in plain decoding and taking turns, and with both, as in the
stream: they share caches and memory, and on a machine with few cores the cores too.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from tokenizers import Tokenizer

from outrider.launcher import StackOptions
from outrider.simulate.in_service import InService, Service
from outrider.simulate.measured import Measured
from outrider.simulate.taps import PATIENCE_S, DraftTap, TargetTap, tapped_pair
from speculation.acceptance import AcceptanceProfile
from speculation.adaptive_k import GoodputK, Load
from speculation.cost import StepCostModel
from speculation.fingerprint import fingerprint
from speculation.messages import (
    CloseSession,
    Commit,
    Method,
    OpenDraft,
    OpenTarget,
    Proposal,
    Sampling,
    StepReport,
    Verdict,
)
from speculation.relay import RelaySession
from speculation.simulator import Costs, RecordedText

_NUM_VERIFIED: Final = 4
"""Drafted tokens of a turn whose hops are timed."""
_NUM_PACES: Final = 5
_TOGETHER: Final = 4
"""Sessions at a time, to see what a row of a draft step costs."""
_MANY_DRAFTS: Final = 48
_GREEDY: Final = Sampling()
_ONE_BY_ONE: Final = Sampling(1.0, method=Method.REJECTION, draft_top_n=1)
"""The best token too, but a token a step: by this method a drafter looks nothing up."""


@dataclass(frozen=True, slots=True)
class WorkerCosts:
    """One worker's costs, and a hop between it and the coordinator, in seconds."""

    costs: Costs
    hop_s: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """All that a simulation of the pair needs to know."""

    target_alone: WorkerCosts
    target_beside: WorkerCosts
    """While the drafter drafts."""
    draft_alone: WorkerCosts
    draft_beside: WorkerCosts
    """While the target verifies."""
    coordinator_s: float
    texts: tuple[RecordedText, ...]
    """By prompt."""
    num_prompt_tokens: int
    """On average."""
    num_output_tokens: int
    proposed_per_token: float = 0.0
    """Drafted tokens per token generated, one request at a time under the default policy; 0: not measured."""


async def calibrate(
    options: StackOptions, prompts: Sequence[str], cells: Sequence[Measured], num_rounds: int
) -> tuple[Calibration, tuple[Measured, ...]]:
    """Starts both workers, measures their costs and the cells, ends them."""
    num_tokens = max(cell.num_tokens for cell in cells)
    async with tapped_pair(options) as (target, draft, tokenizer_json, addresses):
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
        encoded = [tuple(tokenizer.encode(text).ids) for text in prompts]
        in_service = await Service(addresses, cells, PATIENCE_S).observe(prompts, num_rounds)
        return await _Probe(target, draft, encoded, num_tokens).run(in_service), in_service.cells


class _Probe:
    def __init__(self, target: TargetTap, draft: DraftTap, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> None:
        self._target = target
        self._draft = draft
        self._prompts = prompts
        self._num_tokens = num_tokens
        self._ids = itertools.count(1)
        self._texts: list[list[int]] = []  # the target's, by prompt

    async def run(self, in_service: InService) -> Calibration:
        for prompt in self._prompts:
            self._texts.append(await self._decode(prompt))
        recorded = [await self._record(index) for index in range(len(self._prompts))]
        hop_alone_s, draft_alone = await self._target_hop_s(), await self._draft_costs()
        async with self._beside(self._keep_drafting):
            hop_beside_s = await self._target_hop_s()
        async with self._beside(self._keep_decoding):
            draft_beside = await self._draft_costs()
        return Calibration(
            target_alone=WorkerCosts(in_service.target_alone, hop_alone_s),
            target_beside=WorkerCosts(in_service.target_beside, hop_beside_s),
            draft_alone=draft_alone,
            draft_beside=draft_beside,
            coordinator_s=relay_s(),
            texts=tuple(recorded),
            num_prompt_tokens=round(statistics.mean(len(prompt) for prompt in self._prompts)),
            num_output_tokens=self._num_tokens,
            proposed_per_token=in_service.proposed_per_token,
        )

    # -- the target -------------------------------------------------------------------------------------------------

    async def _decode(self, prompt: tuple[int, ...]) -> list[int]:
        """Plain decoding."""
        text: list[int] = []
        self._target.send(next(self._ids), OpenTarget(prompt, _GREEDY, len(prompt) + self._num_tokens, (), 0))
        while len(text) < self._num_tokens:
            _, frame = await self._target.next()
            for _, event in frame.items:
                if isinstance(event, Verdict):
                    text.extend(event.token_ids)
        return text

    async def _target_hop_s(self) -> float:
        """Median of a hop to the target or back: half of what is left of a turn without its step."""
        prompt, text = self._prompts[0], self._texts[0]
        session, times = next(self._ids), list[float]()
        max_length = len(prompt) + self._num_tokens + _NUM_VERIFIED + 2  # the end is never near
        self._target.send(session, OpenTarget(prompt, _GREEDY, max_length, (), _NUM_VERIFIED, turns=True))
        await self._target.next()
        start = 1
        while start + _NUM_VERIFIED < self._num_tokens:
            known, drafts = (*prompt, *text[:start]), tuple(text[start : start + _NUM_VERIFIED])
            sent_s = time.perf_counter()
            self._target.send(session, Proposal(len(known), fingerprint(known), drafts, (1.0,) * _NUM_VERIFIED))
            arrived_s, frame = await self._target.next()
            assert frame.step is not None
            times.append((arrived_s - sent_s - frame.step.step_s) / 2)
            # Not always all: the planner verifies fewer where it has learned that so many do not pay.
            start += sum(len(event.token_ids) for _, event in frame.items if isinstance(event, Verdict))
        self._target.send(session, CloseSession())
        return max(0.0, statistics.median(times))

    # -- the drafter ------------------------------------------------------------------------------------------------

    async def _record(self, index: int) -> RecordedText:
        """Every token of the target's text is told after the drafter has guessed it."""
        prompt, text = self._prompts[index], self._texts[index]
        guesses, _ = await self._follow(prompt, text)
        foreseen = tuple(guess == token_id for guess, token_id in zip(guesses, text, strict=True))
        return RecordedText(prompt, tuple(text), foreseen)

    async def _follow(self, prompt: tuple[int, ...], text: Sequence[int]) -> tuple[list[int], list[float]]:
        """Guesses of the text's tokens, and seconds from telling a token to the next guess; the first one prefills."""
        session, guesses, times = next(self._ids), list[int](), list[float]()
        known = list(prompt)
        self._draft.send(session, OpenDraft(prompt, _GREEDY, 1))
        for token_id in text:
            sent_s = time.perf_counter()
            arrived_s, guess = await self._next_guess(session, len(known))
            guesses.append(guess)
            times.append(arrived_s - sent_s)
            self._draft.send(session, Commit(len(known), (token_id,)))
            known.append(token_id)
        self._draft.send(session, CloseSession())
        return guesses, times

    async def _next_guess(self, session: int, position: int) -> tuple[float, int]:
        while True:
            arrived_s, frame = await self._draft.next()
            for session_id, event in frame:
                if session_id == session and isinstance(event, Proposal) and event.prefix_length == position:
                    return arrived_s, event.token_ids[0]

    async def _draft_costs(self) -> WorkerCosts:
        single_s, several_s = await self._draft_step(1), await self._draft_step(_TOGETHER)
        _, times = await self._follow(self._prompts[0], self._texts[0])
        row_s = max(0.0, (several_s - single_s) / (_TOGETHER - 1))
        hop_s = max(0.0, statistics.median(times[1:]) - single_s) / 2
        return WorkerCosts(Costs(single_s - row_s, row_s), hop_s)

    async def _draft_step(self, num_sessions: int) -> float:
        """Median seconds of a step that drafts for so many sessions, everything in between included."""
        paces = []
        for _ in range(_NUM_PACES):
            arrivals = await self._draft_ahead(num_sessions)
            (first_s, num_first), (last_s, num_all) = arrivals[0], arrivals[-1]
            paces.append((last_s - first_s) * num_sessions / (num_all - num_first))
        return statistics.median(paces)

    async def _draft_ahead(self, num_sessions: int) -> list[tuple[float, int]]:
        """Times at which so many drafts, of all sessions together, were there."""
        known = (*self._prompts[0], self._texts[0][0])
        sessions = [next(self._ids) for _ in range(num_sessions)]
        for session in sessions:
            self._draft.send(session, OpenDraft(known, _ONE_BY_ONE, _MANY_DRAFTS))
        num_drafted, arrivals = 0, []
        while num_drafted < _MANY_DRAFTS * num_sessions:
            arrived_s, frame = await self._draft.next()
            ours = [event for session, event in frame if session in sessions and isinstance(event, Proposal)]
            num_drafted += sum(len(event.token_ids) for event in ours)
            arrivals.append((arrived_s, num_drafted))
        for session in sessions:
            self._draft.send(session, CloseSession())
        return arrivals

    # -- the other one, meanwhile -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def _beside(self, work: Callable[[], Coroutine[None, None, None]]) -> AsyncIterator[None]:
        task = asyncio.create_task(work())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep_drafting(self) -> None:
        while True:
            await self._draft_ahead(1)

    async def _keep_decoding(self) -> None:
        while True:
            await self._decode(self._prompts[0])


def relay_s() -> float:
    """Seconds that a coordinator thinks about one verdict: relay, policy, costs."""
    costs, reports = StepCostModel(), 200
    relay = RelaySession((1,), _GREEDY, 10 * reports, (), GoodputK(6, costs, AcceptanceProfile()), 20)
    relay.on_target_up(0.0)
    relay.on_draft_up(0.0)
    start_s = time.perf_counter()
    for index in range(reports):
        costs.observe(StepReport(0.01, 1, 1 + index % 7))
        verdict = Verdict(1 + 3 * index, (1, 2, 3), 4, 2, 0)
        relay.on_target_event(verdict, Load(1), 0.01 * index)
    return (time.perf_counter() - start_s) / reports
