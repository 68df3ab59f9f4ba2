"""Where verifying several tokens in one pass draws another token than decoding them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.doctor.rounding import Rounding


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One of the two tokens."""

    token_id: int
    logit: float
    """As decoding one by one computed it."""
    noise: float
    """What its draw added, in units of logits: temperature times Gumbel noise; 0 when greedy."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """One token that is not plain decoding's."""

    way: str
    """How it was verified."""
    prompt_index: int
    position: int
    """In the output, from 0."""
    temperature: float
    plain: TokenScore
    verified: TokenScore
    spread: float
    """Standard deviation of the row's logits."""
    shift: float
    """How far the two passes are apart in the difference of the two tokens' logits."""
    bound: float

    @property
    def margin(self) -> float:
        """By how much plain decoding's token was ahead, noise included, in units of logits."""
        return (self.plain.logit + self.plain.noise) - (self.verified.logit + self.verified.noise)

    @property
    def is_explained(self) -> bool:
        """Rounding explains it."""
        return self.margin <= self.bound


def bound_of(rounding: Rounding, spread: float, plain_logit: float, verified_logit: float) -> float:
    """The greatest margin that rounding explains between these two logits of a row."""
    return rounding.bound(spread, max(abs(plain_logit), abs(verified_logit)))


@dataclass(frozen=True, slots=True)
class Verified:
    """One way of verifying, over all prompts, at one temperature."""

    way: str
    temperature: float
    num_tokens: int
    """Compared."""
    num_steps: int
    largest_shift: float
    """Of any logit of any row between the two passes."""
    divergences: tuple[Divergence, ...]


def unexplained(results: Sequence[Verified]) -> list[Divergence]:
    """What rounding does not explain."""
    return [one for result in results for one in result.divergences if not one.is_explained]
