"""How much one client may ask for: so many requests a minute, so many at once, and a few that wait for either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace

from asyncio_throttle.throttler import Throttler

from coordinator.http.keys import ApiKey
from rpc.errors import Overloaded

RATE_PERIOD_S = 60.0
RATE_POLL_S = 0.05
"""How often a waiting request looks whether it may go on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one client; 0 is no limit."""

    requests_per_minute: int = 0
    max_concurrent: int = 0
    max_waiting: int = 16
    """Requests that may wait for the two others."""
    max_wait_s: float = 30.0


class ClientGate:
    """Lets one client's requests through as its limits allow."""

    def __init__(self, name: str, limits: Limits) -> None:
        self._name = name
        self._limits = limits
        rate, concurrent = limits.requests_per_minute, limits.max_concurrent
        self._rate = Throttler(rate, RATE_PERIOD_S, RATE_POLL_S) if rate else nullcontext()
        self._places = asyncio.Semaphore(concurrent) if concurrent else nullcontext()
        self._num_waiting = 0

    @asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        """Within, a request is under way. Raises `Overloaded` if too many wait, or this one has for too long."""
        if self._num_waiting >= self._limits.max_waiting:
            raise self._overloaded(f"{self._num_waiting} requests of {self._name!r} wait already")
        self._num_waiting += 1
        is_waiting = True
        try:
            async with asyncio.timeout(self._limits.max_wait_s) as waiting, self._rate, self._places:
                waiting.reschedule(None)
                self._num_waiting -= 1
                is_waiting = False
                yield
        except TimeoutError:
            if not is_waiting:
                raise
            raise self._overloaded(f"no room for {self._name!r} within {self._limits.max_wait_s:g} s") from None
        finally:
            self._num_waiting -= is_waiting

    def _overloaded(self, problem: str) -> Overloaded:
        limits = self._limits
        allowed = [f"{limits.requests_per_minute} requests a minute"] if limits.requests_per_minute else []
        allowed += [f"{limits.max_concurrent} at once"] if limits.max_concurrent else []
        return Overloaded(f"{problem} ({' and '.join(allowed)} are allowed); try again later", self._retry_after_s())

    def _retry_after_s(self) -> float:
        """When a place should be free for one more: of a rate that is known, otherwise it is a guess."""
        rate = self._limits.requests_per_minute
        return min(RATE_PERIOD_S, (self._num_waiting + 1) * RATE_PERIOD_S / rate) if rate else 1.0


@dataclass(slots=True)
class Gates:
    """A gate for each client, made when it first comes."""

    defaults: Limits
    _gates: dict[tuple[str, Limits], ClientGate] = field(default_factory=dict)

    def gate_of(self, key: ApiKey | None) -> ClientGate:
        """``None`` is everybody, where no keys are needed."""
        name, limits = ("anyone", self.defaults) if key is None else (key.name, self._limits_of(key))
        gate = self._gates.get((name, limits))
        if gate is None:
            gate = self._gates[name, limits] = ClientGate(name, limits)
        return gate

    def _limits_of(self, key: ApiKey) -> Limits:
        own = {"requests_per_minute": key.requests_per_minute, "max_concurrent": key.max_concurrent}
        return replace(self.defaults, **{name: value for name, value in own.items() if value is not None})
