"""What is measured: anything that completes a task and says when its tokens came."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol

from outrider.client import Client, Event, Speculation, SpeculationStats, Tokens, collect

OUTRIDER: Final = "outrider"
PLAIN: Final = "plain"
TURNS: Final = "turns"
TRANSFORMERS_PLAIN: Final = "transformers-plain"
TRANSFORMERS_ASSISTED: Final = "transformers-assisted"
TRANSFORMERS_LOOKUP: Final = "transformers-lookup"
WRONG_DRAFTER: Final = "outrider-wrong-drafter"
NO_DRAFTER: Final = "outrider-no-drafter"

TRANSFORMERS: Final = (TRANSFORMERS_LOOKUP, TRANSFORMERS_ASSISTED, TRANSFORMERS_PLAIN)

SYSTEMS: Final = (OUTRIDER, PLAIN, TURNS, *TRANSFORMERS, WRONG_DRAFTER, NO_DRAFTER)
"""All that can be measured, besides outrider with a fixed K (`fixed_k_name`)."""

_FIXED: Final = "outrider-fixed-"


@dataclass(frozen=True, slots=True)
class Task:
    """One completion, of equal length for every system: EOS does not end it."""

    prompt_index: int
    prompt: str
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Run:
    """One task done. Times are in seconds from the request."""

    token_ids: tuple[int, ...]
    first_token_s: float
    """Until the first tokens came."""
    num_first_tokens: int
    """Tokens that came together with the first."""
    total_s: float
    """Until the last token came."""
    speculation: SpeculationStats | None = None
    """None: the system does not speculate."""


class System(Protocol):
    """Completes tasks; those that are served, any number at a time."""

    @property
    def name(self) -> str: ...

    def must_equal_plain(self, temperature: float) -> bool:
        """Whether its tokens have to be those of plain decoding through the server."""
        ...

    async def run(self, task: Task) -> Run: ...


@dataclass(frozen=True, slots=True)
class ServedSystem:
    """A deployment asked through its front door, in one way of decoding."""

    name: str
    client: Client
    speculation: Speculation

    def must_equal_plain(self, temperature: float) -> bool:
        return True

    async def run(self, task: Task) -> Run:
        """One completion, timed here, at the client. Raises the errors of `rpc.errors`."""
        events: list[Event] = []
        arrivals: list[tuple[float, int]] = []
        start_s = time.perf_counter()
        stream = self.client.generate(
            task.prompt,
            max_tokens=task.max_tokens,
            temperature=task.temperature,
            seed=task.seed,
            ignore_eos=True,
            speculation=self.speculation,
        )
        async with aclosing(stream):
            async for event in stream:
                if isinstance(event, Tokens):
                    arrivals.append((time.perf_counter() - start_s, len(event.tokens)))
                events.append(event)
        completion = collect(events)
        (first_s, num_first), (last_s, _) = arrivals[0], arrivals[-1]
        stats = None if self.speculation.disabled else completion.speculation
        return Run(completion.token_ids, first_s, num_first, last_s, stats)


def fixed_k_name(k: int) -> str:
    """The name of outrider under the policy ``fixed``."""
    return f"{_FIXED}{k}"


def fixed_k(name: str) -> int | None:
    """The K in such a name; None for any other system."""
    return int(name.removeprefix(_FIXED)) if name.startswith(_FIXED) else None


def served_system(name: str, client: Client) -> ServedSystem:
    """The way of decoding that the name says, through this front door."""
    k = fixed_k(name)
    if k is not None:
        return ServedSystem(name, client, Speculation(policy="fixed", k=k))
    if name == TURNS:
        return ServedSystem(name, client, Speculation(turns=True))
    return plain_system(client) if name == PLAIN else speculative_system(name, client)


def speculative_system(name: str, client: Client) -> ServedSystem:
    """Decoding as the deployment does it unasked."""
    return ServedSystem(name, client, Speculation())


def plain_system(client: Client) -> ServedSystem:
    """Plain decoding through the same server."""
    return ServedSystem(PLAIN, client, Speculation(disabled=True))
