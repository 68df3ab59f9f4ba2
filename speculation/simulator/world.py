"""One deployment and its clients, put together and run to the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from speculation.messages import DraftCommand, TargetCommand
from speculation.simulator.clients import Clients, OnOutput, Tally
from speculation.simulator.clock import VirtualClock
from speculation.simulator.coordinator import ModelledCoordinator, Peer
from speculation.simulator.links import Link
from speculation.simulator.report import Report
from speculation.simulator.scenario import Scenario
from speculation.simulator.tokens import TokenProcess
from speculation.simulator.workers import ModelledDrafter, ModelledTarget, Work

FrameT = TypeVar("FrameT")


def simulate(scenario: Scenario, on_output: OnOutput | None = None) -> Report:
    """Runs all sessions of the scenario. Raises ValueError on a scenario that makes no sense."""
    _check(scenario)
    return _World(scenario, on_output).run()


def _check(scenario: Scenario) -> None:
    load = scenario.load
    if min(load.num_sessions, load.concurrency, load.num_prompt_tokens, load.num_output_tokens) < 1:
        raise ValueError("a load needs at least one session, one at a time, one prompt token and one output token")
    if min(scenario.num_targets, scenario.max_sessions) < 1:
        raise ValueError("at least one target, with room for one session, is needed")
    if scenario.target.step_s(1, 1) <= 0.0:
        raise ValueError("a target step has to take time")


class _World:
    def __init__(self, scenario: Scenario, on_output: OnOutput | None) -> None:
        self._scenario = scenario
        self._clock = VirtualClock()
        self._num_frames: list[Callable[[], int]] = []
        self._coordinator = ModelledCoordinator(self._clock, scenario)
        tokens = TokenProcess(scenario.acceptance, scenario.runner_up_shares)
        self._clients = Clients(self._clock, scenario, self._coordinator, tokens, on_output)
        num_drafters = scenario.num_drafters if scenario.policy is not None else 0
        self._targets = [self._add_target(tokens) for _ in range(scenario.num_targets)]
        self._drafters = [self._add_drafter(tokens) for _ in range(num_drafters)]

    def _add_target(self, tokens: TokenProcess) -> ModelledTarget:
        worker = ModelledTarget(self._clock, self._scenario, tokens)
        latency_s = self._scenario.latencies.target_s
        peer: Peer[TargetCommand] = Peer(self._link(latency_s, worker.receive), self._clock)
        worker.send = self._link(latency_s, partial(self._coordinator.on_target_frame, peer)).send
        self._coordinator.targets.append(peer)
        return worker

    def _add_drafter(self, tokens: TokenProcess) -> ModelledDrafter:
        worker = ModelledDrafter(self._clock, self._scenario, tokens)
        latency_s = self._scenario.latencies.draft_s
        peer: Peer[DraftCommand] = Peer(self._link(latency_s, worker.receive), self._clock)
        worker.send = self._link(latency_s, partial(self._coordinator.on_draft_frame, peer)).send
        self._coordinator.drafts.append(peer)
        return worker

    def _link(self, latency_s: float, deliver: Callable[[FrameT], None]) -> Link[FrameT]:
        seed = self._scenario.seed * 1009 + len(self._num_frames)
        link = Link(self._clock, latency_s, self._scenario.latencies.jitter, deliver, seed)
        self._num_frames.append(lambda: link.num_frames)
        return link

    def run(self) -> Report:
        load = self._scenario.load
        if load.num_warm_up:
            self._clients.ask(load.num_warm_up)
        target, draft, num_frames = self._target_work(), self._draft_work(), self._frames()
        num_to_target = self._frames_to_target()
        tally = self._clients.ask(load.num_sessions)
        target, draft = self._target_work() - target, self._draft_work() - draft
        return _report(tally, target, draft, self._frames() - num_frames, self._frames_to_target() - num_to_target)

    def _target_work(self) -> Work:
        return sum((worker.work for worker in self._targets), Work())

    def _draft_work(self) -> Work:
        return sum((worker.work for worker in self._drafters), Work())

    def _frames(self) -> int:
        return sum(count() for count in self._num_frames)

    def _frames_to_target(self) -> int:
        return sum(target.link.num_frames for target in self._coordinator.targets)


def _report(tally: Tally, target: Work, draft: Work, num_frames: int, num_frames_to_target: int) -> Report:
    total, elapsed_s = tally.total, tally.last_s - tally.start_s
    return Report(
        num_sessions=len(tally.first_token_s),
        tokens_per_s=total.num_committed / elapsed_s,
        elapsed_s=elapsed_s,
        num_tokens=total.num_committed,
        num_steps=total.num_steps,
        num_free_runs=total.num_free_run_steps,
        num_drafted=total.num_drafted,
        num_accepted=total.num_accepted,
        num_proposed=total.num_proposed,
        num_dropped=total.num_dropped,
        sum_k=total.sum_k,
        num_misses=total.num_misses,
        num_caught=total.num_caught,
        first_token_s=tuple(tally.first_token_s),
        per_token_s=tuple(tally.per_token_s),
        target_steps=target.num_steps,
        target_busy_s=target.busy_s,
        target_waited_s=target.waited_s,
        draft_steps=draft.num_steps,
        draft_tokens=draft.num_tokens,
        draft_busy_s=draft.busy_s,
        num_frames=num_frames,
        num_frames_to_target=num_frames_to_target,
    )
