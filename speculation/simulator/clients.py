"""Who asks, when, and what the answers came to."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import log
from typing import Final, TypeAlias

from speculation.fingerprint import mix64
from speculation.messages import SessionId, TokenId
from speculation.session_stats import SessionStats
from speculation.simulator.clock import VirtualClock
from speculation.simulator.coordinator import ModelledCoordinator, Request
from speculation.simulator.scenario import Scenario
from speculation.simulator.tokens import TokenProcess

OnOutput: TypeAlias = Callable[[int, Sequence[TokenId]], None]
"""Told a session's seed and its tokens, prompt apart, when it is over."""

_COUNTS: Final = (
    "num_steps",
    "num_free_run_steps",
    "num_committed",
    "num_drafted",
    "num_accepted",
    "num_proposed",
    "num_dropped",
    "sum_k",
    "num_misses",
    "num_caught",
)


def session_seed(seed: int, index: int) -> int:
    """Sampling seed of the ``index``-th session, warm-up included."""
    return mix64(mix64(seed) + index)


@dataclass(slots=True)
class Tally:
    """What the sessions that are over came to."""

    start_s: float
    total: SessionStats = field(default_factory=SessionStats)
    first_token_s: array[float] = field(default_factory=lambda: array("d"))
    per_token_s: array[float] = field(default_factory=lambda: array("d"))
    last_s: float = 0.0

    def add(self, request: Request, stats: SessionStats, client_s: float) -> None:
        for name in _COUNTS:
            setattr(self.total, name, getattr(self.total, name) + getattr(stats, name))
        self.first_token_s.append(request.first_token_s + client_s - request.asked_s)
        num_later = stats.num_committed - 1
        self.per_token_s.append((request.over_s - request.first_token_s) / num_later if num_later else 0.0)
        self.last_s = request.over_s + client_s


class Clients:
    """Asks for the scenario's sessions."""

    def __init__(
        self,
        clock: VirtualClock,
        scenario: Scenario,
        coordinator: ModelledCoordinator,
        tokens: TokenProcess,
        on_output: OnOutput | None,
    ) -> None:
        self._clock = clock
        self._load = scenario.load
        self._client_s = scenario.latencies.client_s
        self._seed = scenario.seed
        self._coordinator = coordinator
        self._tokens = tokens
        self._on_output = on_output
        self._num_asked = 0
        self._num_open = 0
        self._num_left = 0  # of those that `ask` was told of
        self._tally = Tally(0.0)

    def ask(self, num_sessions: int) -> Tally:
        """Lets so many sessions run to their end."""
        self._tally = Tally(self._clock.now_s)
        self._num_left = num_sessions
        if self._load.arrivals_per_s:
            self._arrive()
        else:
            self._ask_several()
        self._clock.run()
        return self._tally

    def _ask_several(self) -> None:
        for _ in range(min(self._load.concurrency - self._num_open, self._num_left)):
            self._ask_one()

    def _arrive(self) -> None:
        self._ask_one()
        if self._num_left:
            chance = (mix64(session_seed(self._seed, self._num_asked)) + 1) * 2.0**-64
            self._clock.at(self._clock.now_s - log(chance) / self._load.arrivals_per_s, self._arrive)

    def _ask_one(self) -> None:
        self._num_left -= 1
        self._num_open += 1
        seed = session_seed(self._seed, self._num_asked)
        self._num_asked += 1
        prompt = self._tokens.prompt(seed, self._load.num_prompt_tokens)
        length = len(prompt) + self._load.num_output_tokens
        request = Request(SessionId(self._num_asked), seed, prompt, length, self._clock.now_s, self._on_over)
        self._clock.at(self._clock.now_s + self._client_s, partial(self._coordinator.on_request, request))

    def _on_over(self, request: Request) -> None:
        relay = request.relay
        assert relay is not None
        self._tally.add(request, relay.stats, self._client_s)
        self._num_open -= 1
        if self._on_output is not None:
            self._on_output(request.seed, list(relay.token_ids[len(request.prompt) :]))
        if not self._load.arrivals_per_s and not (self._load.in_batches and self._num_open):
            self._clock.at(self._clock.now_s + self._client_s, self._ask_several)
