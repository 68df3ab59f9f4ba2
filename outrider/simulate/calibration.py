"""What a pair costs on this machine, measured at its own workers, so that it can be simulated.

The coordinator's place is taken by this process, so a hop is what it is in service: gRPC, event loop and the worker's
thread. Everything is measured twice, with the other worker idle and with it busy: two models share caches and memory,
and what shares a machine with few cores waits for them. Plain decoding and taking turns have one model at work at a
time, the stream both.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from tokenizers import Tokenizer

from outrider.launcher import StackOptions
from outrider.simulate.in_service import Service, never_falling
from outrider.simulate.measured import Measured
from outrider.simulate.taps import PATIENCE_S, DraftTap, TargetTap, tapped_pair
from speculation.acceptance import AcceptanceProfile
from speculation.adaptive_k import GoodputK, Load
from speculation.cost import StepCostModel
from speculation.fingerprint import fingerprint
from speculation.messages import (
    CloseSession,
    Commit,
    OpenDraft,
    OpenTarget,
    Proposal,
    Sampling,
    StepReport,
    Verdict,
)
from speculation.relay import RelaySession
from speculation.simulator import Costs

VERIFIED: Final = (0, 1, 2, 4, 6, 8)
"""Numbers of drafted tokens in the steps that are timed."""

_NUM_TIMED: Final = 15
_TOGETHER: Final = 4
"""Sessions at a time, to see what a session costs."""
_MANY_DRAFTS: Final = 48
_GREEDY: Final = Sampling()


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
    traces: tuple[tuple[bool, ...], ...]
    """By prompt: was the drafter's guess the target's token, for each output token after the first?"""
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
        found = await _Probe(target, draft, encoded, num_tokens).run()
        in_service = await Service(addresses, cells, PATIENCE_S).observe(prompts, num_rounds)
        calibration = replace(
            found,
            target_beside=replace(found.target_beside, costs=in_service.target),
            proposed_per_token=in_service.proposed_per_token,
        )
        return calibration, in_service.cells


class _Probe:
    def __init__(self, target: TargetTap, draft: DraftTap, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> None:
        self._target = target
        self._draft = draft
        self._prompts = prompts
        self._num_tokens = num_tokens
        self._ids = itertools.count(1)
        self._texts: list[list[int]] = []  # the target's, by prompt

    async def run(self) -> Calibration:
        for prompt in self._prompts:
            self._texts.append((await self._decode([prompt]))[0])
        traces = [await self._trace(index) for index in range(len(self._prompts))]
        target_alone, draft_alone = await self._target_costs(), await self._draft_costs()
        async with self._beside(self._keep_drafting):
            target_beside = await self._target_costs()  # its hop; the costs are better known from service
        async with self._beside(self._keep_decoding):
            draft_beside = await self._draft_costs()
        return Calibration(
            target_alone,
            target_beside,
            draft_alone,
            draft_beside,
            relay_s(),
            tuple(traces),
            round(statistics.mean(len(prompt) for prompt in self._prompts)),
            self._num_tokens,
        )

    # -- the target -------------------------------------------------------------------------------------------------

    async def _decode(self, prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """Plain decoding of several prompts at a time."""
        texts: dict[int, list[int]] = {}
        async for items, _, _ in self._decoding(prompts):
            for session_id, token_ids in items:
                texts.setdefault(session_id, []).extend(token_ids)
        return [texts[session_id] for session_id in sorted(texts)]

    async def _decoding(
        self, prompts: Sequence[tuple[int, ...]]
    ) -> AsyncIterator[tuple[list[tuple[int, tuple[int, ...]]], StepReport, float]]:
        """News, cost and time of arrival of each step of plain decoding."""
        for prompt in prompts:
            command = OpenTarget(prompt, _GREEDY, len(prompt) + self._num_tokens, (), 0)
            self._target.send(next(self._ids), command)
        num_open = len(prompts)
        while num_open:
            arrived_s, frame = await self._target.next()
            verdicts = [(int(session_id), event) for session_id, event in frame.items if isinstance(event, Verdict)]
            num_open -= sum(verdict.finish_reason is not None for _, verdict in verdicts)
            assert frame.step is not None
            yield [(session_id, verdict.token_ids) for session_id, verdict in verdicts], frame.step, arrived_s

    async def _target_costs(self) -> WorkerCosts:
        single_s, overhead_s, prefill_s = await self._plain_steps(1)
        several_s, _, _ = await self._plain_steps(_TOGETHER)
        points, hops = [(1, single_s)], []
        for num_drafted in VERIFIED[1:]:
            step_s, hop_s = await self._verify_steps(num_drafted)
            points.append((1 + num_drafted, step_s))
            hops.append(hop_s)
        rising = never_falling(points)
        alone_s = Costs(0.0, points=tuple(rising)).step_s(_TOGETHER, 1)
        session_s = max(0.0, (several_s - alone_s) / (_TOGETHER - 1))
        num_prompt = len(self._prompts[0])
        if num_prompt > rising[-1][0]:
            rising.append((num_prompt, max(prefill_s, rising[-1][1])))
        costs = Costs(0.0, 0.0, session_s, overhead_s, tuple((n, s - session_s) for n, s in rising))
        return WorkerCosts(costs, statistics.median(hops))

    async def _plain_steps(self, num_sessions: int) -> tuple[float, float, float]:
        """Medians of a plain step and of what lies between two; the seconds of the first step, a prefill."""
        reports, arrivals = [], []
        prompts = [self._prompts[0]] * num_sessions
        async for _, report, arrived_s in self._decoding(prompts):
            reports.append(report)
            arrivals.append(arrived_s)
        steps = [report.step_s for report in reports if report.num_tokens == num_sessions]
        between = [
            later - earlier - report.step_s
            for earlier, later, report in zip(arrivals, arrivals[1:], reports[1:], strict=False)
        ]
        return statistics.median(steps), max(0.0, statistics.median(between)), reports[0].step_s

    async def _verify_steps(self, num_drafted: int) -> tuple[float, float]:
        """Medians of a step with so many right drafts, and of a hop to the target or back."""
        prompt, text = self._prompts[0], self._texts[0]
        session, times = next(self._ids), list[tuple[float, float]]()
        max_length = len(prompt) + self._num_tokens + num_drafted + 2  # the end is never near
        command = OpenTarget(prompt, _GREEDY, max_length, (), num_drafted, turns=True)
        self._target.send(session, command)
        await self._target.next()
        num_done = 1
        while num_done + num_drafted + 1 < len(text) and len(times) < _NUM_TIMED:
            known = (*prompt, *text[:num_done])
            drafts = tuple(text[num_done : num_done + num_drafted])
            sent_s = time.perf_counter()
            self._target.send(session, Proposal(len(known), fingerprint(known), drafts, (1.0,) * num_drafted))
            arrived_s, frame = await self._target.next()
            assert frame.step is not None
            times.append((frame.step.step_s, (arrived_s - sent_s - frame.step.step_s) / 2))
            num_done += num_drafted + 1
        self._target.send(session, CloseSession())
        step_s, hop_s = (statistics.median(column) for column in zip(*times, strict=True))
        return step_s, hop_s

    # -- the drafter ------------------------------------------------------------------------------------------------

    async def _trace(self, index: int) -> tuple[bool, ...]:
        """Every token of the target's text is told after the drafter has guessed it."""
        guesses, _ = await self._follow(self._prompts[index], self._texts[index])
        return tuple(guess == token_id for guess, token_id in zip(guesses, self._texts[index][1:], strict=True))

    async def _follow(self, prompt: tuple[int, ...], text: Sequence[int]) -> tuple[list[int], list[float]]:
        """Guesses after the first token of the text, and seconds from telling a token to the next guess."""
        session, guesses, times = next(self._ids), list[int](), list[float]()
        known = [*prompt, text[0]]
        self._draft.send(session, OpenDraft(tuple(known), _GREEDY, 1))
        for token_id in text[1:]:
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
        for _ in range(_NUM_TIMED // 3):
            arrivals = await self._draft_ahead(num_sessions)
            (first_s, num_first), (last_s, num_all) = arrivals[0], arrivals[-1]
            paces.append((last_s - first_s) * num_sessions / (num_all - num_first))
        return statistics.median(paces)

    async def _draft_ahead(self, num_sessions: int) -> list[tuple[float, int]]:
        """Times at which so many drafts, of all sessions together, were there."""
        known = (*self._prompts[0], self._texts[0][0])
        sessions = [next(self._ids) for _ in range(num_sessions)]
        for session in sessions:
            self._draft.send(session, OpenDraft(known, _GREEDY, _MANY_DRAFTS))
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
            await self._decode([self._prompts[0]])


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
