"""Settings of ``outrider simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeVar

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from speculation.adaptive_k import POLICY_NAMES
from speculation.guesses import NUM_RUNNERS_UP

ValueT = TypeVar("ValueT", int, float, str)

TURNS: Final = "turns"
SYSTEMS: Final = (*POLICY_NAMES, TURNS)
"""The stream under each policy, and taking turns with a fixed K."""

_MAX_CONCURRENCY: Final = 4096


class SimulateSettings(BaseSettings):
    """``outrider simulate``. Lists are separated by commas, and every combination is simulated."""

    model_config = SettingsConfigDict(
        env_prefix="OUTRIDER_SIMULATE_",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        populate_by_name=True,
    )

    latency_ms: str = "0,1,5,20,50"
    """One way, between coordinator and drafters."""
    target_latency_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """One way, between coordinator and targets."""
    client_latency_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """One way, between clients and coordinator."""
    jitter: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Every latency is up to this share longer, at random."""
    acceptance: str = "0.75"
    """Chance that a drafted token is right if all before it are; 0.8/0.7/0.6: after 0, 1, 2 or more right in a row."""
    concurrency: str = "1"
    """Sessions at a time at one coordinator."""
    arrivals_per_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Not 0: sessions arrive at random at this rate instead, and wait for a place if they must."""
    systems: str = ",".join(SYSTEMS)
    """What to simulate; plain decoding and the ideal are always there to compare with."""
    max_k: int = Field(default=12, ge=0, le=64)
    """Greatest K, and K itself for fixed and for taking turns."""
    max_lookahead: int = Field(default=64, ge=0, le=256)
    """Draft at most this many tokens beyond the committed ones."""
    max_branches: int = Field(default=4, ge=0, le=16)
    """Branches that a drafter holds for what is likely to be missed."""
    runner_up_shares: str = "0.6/0.2"
    """Of the misses, in which share the drafter's second and third choice are right."""
    target_ms: float = Field(default=28.0, gt=0, allow_inf_nan=False)
    """A verify step, whatever is in it."""
    target_token_ms: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    """And for each token in it."""
    target_session_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """And for each session in it."""
    target_overhead_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """A target's work between two steps."""
    draft_ms: float = Field(default=3.0, ge=0, allow_inf_nan=False)
    """A draft step, whatever is in it."""
    draft_token_ms: float = Field(default=0.02, ge=0, allow_inf_nan=False)
    """And for each token in it."""
    draft_session_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """And for each session in it."""
    draft_overhead_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """A drafter's work between two steps."""
    handling_ms: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    """The coordinator's work for one frame."""
    sessions: int = Field(default=16, ge=1)
    """Sessions of each deployment."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Tokens of each prompt."""
    max_tokens: int = Field(default=128, ge=1)
    """Tokens of each completion."""
    targets: int = Field(default=1, ge=1)
    """Target workers of one coordinator."""
    drafters: int = Field(default=1, ge=1)
    """Draft workers of one coordinator."""
    max_sessions: int = Field(default=64, ge=1)
    """Sessions under way at one target; others wait."""
    deployments: int = Field(default=1, ge=1)
    """Coordinators, each with workers and sessions of its own."""
    processes: int = Field(default=0, ge=0)
    """Of this machine, to simulate deployments side by side. 0: one for each core."""
    seed: int = Field(default=0, ge=0)
    """Another seed: other tokens, arrivals and jitter."""
    as_validate: bool = Field(default=False, validation_alias="OUTRIDER_SIMULATE_VALIDATE")
    """Measure the demo pair on this machine for a minute and simulate the same, instead of all the above."""
    bench: Path | None = None
    """With --validate: compare the cells of this output of outrider bench --json too, and measure its pair."""
    as_json: Path | None = Field(default=None, validation_alias="OUTRIDER_SIMULATE_JSON")
    """Write everything to this file too."""

    @field_validator("latency_ms")
    @classmethod
    def _check_latencies(cls, text: str) -> str:
        if not all(0 <= value < float("inf") for value in _list(text, float)):
            raise ValueError("every value has to be a finite number, 0 or more")
        return text

    @field_validator("acceptance")
    @classmethod
    def _check_acceptance(cls, text: str) -> str:
        if not all(0 <= rate <= 1 for profile in _list(text, str) for rate in rates_of(profile)):
            raise ValueError("every rate has to be in [0, 1]")
        return text

    @field_validator("runner_up_shares")
    @classmethod
    def _check_shares(cls, text: str) -> str:
        shares = rates_of(text)
        if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 or len(shares) > NUM_RUNNERS_UP:
            raise ValueError(f"has to be at most {NUM_RUNNERS_UP} shares that sum up to 1 or less")
        return text

    @field_validator("concurrency")
    @classmethod
    def _check_concurrency(cls, text: str) -> str:
        if not all(1 <= value <= _MAX_CONCURRENCY for value in _list(text, int)):
            raise ValueError(f"every value has to be in [1, {_MAX_CONCURRENCY}]")
        return text

    @field_validator("systems")
    @classmethod
    def _check_systems(cls, text: str) -> str:
        unknown = [name for name in _list(text, str) if name not in SYSTEMS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no system; known are {', '.join(SYSTEMS)}")
        return text

    @property
    def latencies_ms(self) -> tuple[float, ...]:
        return _list(self.latency_ms, float)

    @property
    def acceptances(self) -> tuple[str, ...]:
        """As written."""
        return _list(self.acceptance, str)

    @property
    def concurrencies(self) -> tuple[int, ...]:
        return _list(self.concurrency, int)

    @property
    def system_list(self) -> tuple[str, ...]:
        return _list(self.systems, str)


def rates_of(profile: str) -> tuple[float, ...]:
    """The rates of one acceptance as written. Raises `ValueError`."""
    return tuple(float(part) for part in profile.split("/"))


def _list(text: str, kind: type[ValueT]) -> tuple[ValueT, ...]:
    """The distinct values of a comma-separated list, in order. Raises `ValueError`."""
    values = tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",") if part.strip()))
    if not values:
        raise ValueError("needs at least one value")
    return values
