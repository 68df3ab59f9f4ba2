"""What the models say: a token process whose draws depend on content alone, as those of a real pair do.

The target's token after a sequence is a hash of (seed, position, last token); so tokens committed in the wrong place or
order would derail all that follow. The drafter's guess is that token or another one, by a coin from the same hash.

A token id is ``noise << 5 | run << 1 | strayed``. ``strayed`` is 1 from the first wrong guess on, so neither model
needs to look back to know whether it is still on the target's line. ``run`` is how many guesses up to it were right in
a row, at most 15: an acceptance that differs by depth is one that differs by run.

Such a text never repeats itself, so nothing of it is ever looked up (`speculation.prompt_lookup`). A `Replay` says what
a real pair said: there ``noise`` is the real token's id, and ids are equal exactly where those of the real text are.
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
_FILLER = 15
"""In the place of ``run``, in a replay: this fills up a short prompt. Less tells how often the text has begun again."""

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
    """Chances by the number of right guesses in a row before it; the last one holds for all longer runs.

    The text is made up, and never repeats itself.
    """

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError unless there is a rate, and each is in [0, 1]."""
        if not self.rates or not all(0.0 <= rate <= 1.0 for rate in self.rates):
            raise ValueError(f"acceptance has to be one or more rates in [0, 1], not {self.rates}")

    def is_right(self, seed: int, position: int, run: int, coin: float) -> bool:
        return coin < (self.rates[run] if run < len(self.rates) else self.rates[-1])


class AcceptanceTraces:
    """What a real drafter got right, by seed and output position; beyond a trace's end it begins again.

    Of the text it knows nothing: that is made up, and never repeats itself.
    """

    def __init__(self, traces: Mapping[int, Sequence[bool]], num_prompt_tokens: int) -> None:
        self._traces = traces
        self._start = num_prompt_tokens

    def is_right(self, seed: int, position: int, run: int, coin: float) -> bool:
        trace = self._traces[seed]
        return trace[(position - self._start) % len(trace)]


@dataclass(frozen=True, slots=True)
class RecordedText:
    """What a real target said after a prompt, and which of it its drafter foresaw. Token ids are below 2^20."""

    prompt: tuple[TokenId, ...]
    output: tuple[TokenId, ...]
    foreseen: tuple[bool, ...]
    """By output token: was the drafter's guess that token?"""

    def __post_init__(self) -> None:
        """Raises ValueError unless something was said, and it is known of every token whether it was foreseen."""
        if not self.output or len(self.output) != len(self.foreseen):
            raise ValueError(f"{len(self.output)} output tokens were recorded, and {len(self.foreseen)} guesses")


class Replay:
    """What a real pair said, by seed: the texts themselves, so what they repeat can be looked up."""

    def __init__(self, texts: Mapping[int, RecordedText], num_prompt_tokens: int) -> None:
        """Prompts are brought to one length: longer ones lose their beginning, shorter ones are filled up before it."""
        self._texts = texts
        self._start = num_prompt_tokens

    def is_right(self, seed: int, position: int, run: int, coin: float) -> bool:
        foreseen = self._texts[seed].foreseen
        return foreseen[(position - self._start) % len(foreseen)]

    def token(self, seed: int, position: int) -> TokenId:
        """The token at a position of prompt or output.

        Beyond the output's end it begins again, but in other tokens: else all of it could be looked up.
        """
        text, index = self._texts[seed], position - self._start
        if index >= 0:
            num_rounds, index = divmod(index, len(text.output))
            return text.output[index] << 5 | num_rounds % _FILLER << 1
        if -index <= len(text.prompt):
            return text.prompt[index] << 5
        return position << 5 | _FILLER << 1

    def wrong_guess(self, seed: int, position: int, bits: int) -> TokenId:
        """A word from before ``position``, as a real drafter says: after it something can be looked up."""
        right, guess = self.token(seed, position), self.token(seed, bits % max(position, 1))
        return guess if guess != right else right | 1


class TokenProcess:
    """The two models. Both know the position and the token before it, and nothing else."""

    def __init__(self, acceptance: Acceptance, runner_up_shares: Sequence[float] = ()) -> None:
        """``runner_up_shares``: in which share of the misses the drafter's next-best tokens are right, best first."""
        self._is_right = acceptance.is_right
        self._replay = acceptance if isinstance(acceptance, Replay) else None
        self._shares = tuple(runner_up_shares)

    def prompt(self, seed: int, num_tokens: int) -> tuple[TokenId, ...]:
        """A session's prompt; the same for all seeds unless texts are replayed."""
        if self._replay is not None:
            return tuple(self._replay.token(seed, position) for position in range(num_tokens))
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
        tokens = [self.prompt(seed, num_prompt_tokens)[-1]]
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
        noise, strayed = bits >> (64 - _NOISE_BITS) << 5, self._has_strayed(seed, position, last)
        run = 0 if strayed else last >> 1 & MAX_RUN
        is_right = self._is_right(seed, position, run, (bits & 0xFFFFF) * 2.0**-20)
        if self._replay is not None and not strayed:
            token_id = self._replay.token(seed, position)
            return token_id, token_id if is_right else self._replay.wrong_guess(seed, position, bits), bits
        token_id = noise | (min(run + 1, MAX_RUN) << 1 if is_right else 0) | strayed
        return token_id, token_id if is_right else (token_id | 1) + 2 * strayed, bits

    def _has_strayed(self, seed: int, position: int, last: TokenId) -> int:
        if self._replay is None:
            return last & 1
        # What was looked up bears no mark, and may be wrong all the same.
        return int(last != self._replay.token(seed, position - 1))
