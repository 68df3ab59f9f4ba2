"""What the models say: a token process whose draws depend on content alone, as those of a real pair do.

The target's token after a sequence is a hash of (seed, position, last token); so tokens committed in the wrong place or
order would derail all that follow. The drafter's guess is that token or another one, by a coin from the same hash.

A token id is ``noise << 5 | run << 1 | strayed``. ``strayed`` is 1 from the first wrong guess on, so neither model
needs to look back to know whether it is still on the target's line. ``run`` is how many guesses up to it were right in
a row, at most 15: an acceptance that differs by depth is one that differs by run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Protocol

from speculation.fingerprint import mix64
from speculation.guesses import Guess, RunnerUp
from speculation.messages import TokenId

_NOISE_BITS = 20
VOCAB_SIZE = 1 << (_NOISE_BITS + 5)
MAX_RUN = 15

_MASK = (1 << 64) - 1
_POSITION_STEP = 0x9E3779B97F4A7C15
_TOKEN_STEP = 0xD1B54A32D192ED03

RIGHT_GAP, WRONG_GAP = 3.0, 0.7
"""Mean gaps between the draft model's best two tokens where the best is right and where it is not, both exponential:
of guesses with a gap below 0.5 then half are right at an acceptance of 0.75, of those above 3 98 %, as measured on the
demo pair (`speculation.guesses`)."""


class Acceptance(Protocol):
    """How often the drafter is right."""

    def is_right(self, seed: int, position: int, run: int, coin: float) -> bool:
        """Is the guess at ``position`` the target's token, after ``run`` right ones in a row? ``coin`` in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class AcceptanceByRun:
    """Chances by the number of right guesses in a row before it; the last one holds for all longer runs."""

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError unless there is a rate, and each is in [0, 1]."""
        if not self.rates or not all(0.0 <= rate <= 1.0 for rate in self.rates):
            raise ValueError(f"acceptance has to be one or more rates in [0, 1], not {self.rates}")

    def is_right(self, seed: int, position: int, run: int, coin: float) -> bool:
        return coin < (self.rates[run] if run < len(self.rates) else self.rates[-1])


class AcceptanceTraces:
    """What a real drafter got right, by seed and output position; beyond a trace's end it begins again."""

    def __init__(self, traces: Mapping[int, Sequence[bool]], num_prompt_tokens: int) -> None:
        self._traces = traces
        self._start = num_prompt_tokens

    def is_right(self, seed: int, position: int, run: int, coin: float) -> bool:
        trace = self._traces[seed]
        return trace[(position - self._start) % len(trace)]


class TokenProcess:
    """The two models. Both know the position and the token before it, and nothing else."""

    def __init__(self, acceptance: Acceptance, runner_up_shares: Sequence[float] = ()) -> None:
        """``runner_up_shares``: in which share of the misses the drafter's next-best tokens are right, best first."""
        self._is_right = acceptance.is_right
        self._shares = tuple(runner_up_shares)

    def prompt(self, num_tokens: int) -> tuple[TokenId, ...]:
        """A prompt; sessions differ by their seeds."""
        return tuple(index << 5 for index in range(1, num_tokens + 1))

    def target(self, seed: int, position: int, last: TokenId) -> TokenId:
        """The target's token at ``position``, after ``last``."""
        return self._draw(seed, position, last)[0]

    def target_draws(self, seed: int, start: int, last: TokenId, drafted: Sequence[TokenId]) -> list[TokenId]:
        """The target's tokens at ``start ...``, after ``last`` and each of the ``drafted`` ones."""
        draws = [self.target(seed, start, last)]
        for index, token_id in enumerate(drafted, start=1):
            draws.append(self.target(seed, start + index, token_id))
        return draws

    def plain(self, seed: int, num_prompt_tokens: int, num_tokens: int) -> list[TokenId]:
        """What plain decoding says: ``num_tokens`` tokens after the prompt."""
        tokens = [self.prompt(num_prompt_tokens)[-1]]
        for position in range(num_prompt_tokens, num_prompt_tokens + num_tokens):
            tokens.append(self.target(seed, position, tokens[-1]))
        return tokens[1:]

    def guess(self, seed: int, position: int, last: TokenId) -> Guess:
        """The drafter's token there, and how sure it is."""
        token_id, first, bits = self._draw(seed, position, last)
        mean_gap = RIGHT_GAP if token_id == first else WRONG_GAP
        gap = -mean_gap * log(1.0 - (bits >> 20 & 0xFFFFF) * 2.0**-20)
        if not self._shares:
            return Guess(first, gap, ())
        right = self._right_runner_up(bits) if token_id != first else None
        runners_up = tuple(
            RunnerUp(token_id if index == right else first ^ (2 + index) << 5 | 1, gap * (1 + index))
            for index in range(len(self._shares))
        )
        return Guess(first, gap, runners_up)

    def _right_runner_up(self, bits: int) -> int | None:
        coin = mix64(bits) * 2.0**-64
        for index, share in enumerate(self._shares):
            coin -= share
            if coin < 0.0:
                return index
        return None

    def _draw(self, seed: int, position: int, last: TokenId) -> tuple[TokenId, TokenId, int]:
        """The target's token, the drafter's, and the bits behind them."""
        bits = mix64((seed + position * _POSITION_STEP & _MASK) ^ last * _TOKEN_STEP)
        noise, strayed = bits >> (64 - _NOISE_BITS) << 5, last & 1
        run = 0 if strayed else last >> 1 & MAX_RUN
        if self._is_right(seed, position, run, (bits & 0xFFFFF) * 2.0**-20):
            token_id = noise | min(run + 1, MAX_RUN) << 1 | strayed
            return token_id, token_id, bits
        return noise | strayed, (noise | 1) + 2 * strayed, bits
