"""Settings of ``outrider bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeVar

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from outrider.bench.systems import NO_DRAFTER, SYSTEMS, WRONG_DRAFTER
from outrider.settings import StackSettings

ValueT = TypeVar("ValueT", int, float, str)

_MAX_CONCURRENCY: Final = 256
_MAX_LATENCY_MS: Final = 10_000
_MAX_K: Final = 64


class BenchSettings(StackSettings):
    """``outrider bench``. Lists are separated by commas."""

    model_config = SettingsConfigDict(
        env_prefix="OUTRIDER_BENCH_", frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True
    )

    quick: bool = False
    """About a minute: few prompts, few tokens, one repetition."""
    prompts: int | None = Field(default=None, ge=1)
    """Held-out prompts to complete. Unset: 12, or 3 with --quick."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Tokens of each completion; half as many with several at a time, and of synthetic pairs. Unset: 128, or 32 with
    --quick."""
    repeats: int | None = Field(default=None, ge=1, le=1000)
    """Times that every prompt is completed on the pair, one request at a time and no latency; everywhere else once.
    Unset: 2, or 1 with --quick."""
    systems: str = ""
    """What to measure; plain decoding always runs beside it. Empty: all, with --quick those that use the pair."""
    concurrency: str = ""
    """Requests at a time. Every temperature is measured with the first; the others only with the first temperature.
    Empty: 1,2,4,8,16,32, or 1 with --quick."""
    latencies: str = ""
    """Milliseconds, each way, between drafter and coordinator, in the same manner. Empty: 0,5,20,50, or 0 with
    --quick."""
    temperatures: str = "0,0.8"
    """Temperatures; 0 is greedy."""
    acceptances: str | None = None
    """Acceptance rates, each by a synthetic pair, at the last temperature. "" is none. Unset: five from 0 to 0.95, or
    none with --quick."""
    fixed_ks: str | None = None
    """Ks to compare the policy with, everywhere. "" is none. Unset: 1,2,4,8,12, or none with --quick."""
    slow_target: int = Field(default=1, ge=1, le=100)
    """Make the pair's target so many times as slow, by layers that write nothing: the same text, and steps as long as
    those of larger models."""
    ideal: bool = True
    """Measure what the pair could do if drafts were always there and only the target's steps took time."""
    prompt_file: Path | None = None
    """JSON file with a list "prompts" of texts. Unset: the demo pair's held-out prompts."""
    as_json: Path | None = Field(default=None, validation_alias="OUTRIDER_BENCH_JSON")
    """Write everything measured to this file too."""
    plot: Path | None = None
    """Draw the cells into this PNG file; needs matplotlib (the extra "bench")."""

    @field_validator("systems")
    @classmethod
    def _check_systems(cls, text: str) -> str:
        unknown = [name for name in _some(text, str) if name not in SYSTEMS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no system; known are {', '.join(SYSTEMS)}")
        return text

    @field_validator("concurrency")
    @classmethod
    def _check_concurrency(cls, text: str) -> str:
        if not all(1 <= value <= _MAX_CONCURRENCY for value in _some(text, int)):
            raise ValueError(f"every value has to be in [1, {_MAX_CONCURRENCY}]")
        return text

    @field_validator("latencies")
    @classmethod
    def _check_latencies(cls, text: str) -> str:
        if not all(0 <= value < _MAX_LATENCY_MS for value in _some(text, float)):
            raise ValueError(f"every value has to be in [0, {_MAX_LATENCY_MS}) milliseconds")
        return text

    @field_validator("acceptances")
    @classmethod
    def _check_acceptances(cls, text: str | None) -> str | None:
        if not all(0 <= value <= 1 for value in _some(text or "", float)):
            raise ValueError("every value has to be in [0, 1]")
        return text

    @field_validator("fixed_ks")
    @classmethod
    def _check_fixed_ks(cls, text: str | None) -> str | None:
        if not all(1 <= value <= _MAX_K for value in _some(text or "", int)):
            raise ValueError(f"every value has to be in [1, {_MAX_K}]")
        return text

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, text: str) -> str:
        if not all(0 <= value < float("inf") for value in _list(text, float)):
            raise ValueError("every value has to be a finite number, 0 or more")
        return text

    @property
    def num_prompts(self) -> int:
        return self.prompts or (3 if self.quick else 12)

    @property
    def num_tokens(self) -> int:
        return self.max_tokens or (32 if self.quick else 128)

    @property
    def num_repeats(self) -> int:
        return self.repeats or (1 if self.quick else 2)

    @property
    def system_list(self) -> tuple[str, ...]:
        without = (WRONG_DRAFTER, NO_DRAFTER) if self.quick else ()
        return _some(self.systems, str) or tuple(name for name in SYSTEMS if name not in without)

    @property
    def concurrency_list(self) -> tuple[int, ...]:
        return _some(self.concurrency, int) or ((1,) if self.quick else (1, 2, 4, 8, 16, 32))

    @property
    def latency_list(self) -> tuple[float, ...]:
        return _some(self.latencies, float) or ((0.0,) if self.quick else (0.0, 5.0, 20.0, 50.0))

    @property
    def acceptance_list(self) -> tuple[float, ...]:
        unset = () if self.quick else (0.0, 0.3, 0.6, 0.8, 0.95)
        return unset if self.acceptances is None else _some(self.acceptances, float)

    @property
    def fixed_k_list(self) -> tuple[int, ...]:
        unset = () if self.quick else (1, 2, 4, 8, 12)
        return unset if self.fixed_ks is None else _some(self.fixed_ks, int)

    @property
    def temperature_list(self) -> tuple[float, ...]:
        return _list(self.temperatures, float)


def _list(text: str, kind: type[ValueT]) -> tuple[ValueT, ...]:
    """The distinct values of a comma-separated list, in order. Raises `ValueError`."""
    values = _some(text, kind)
    if not values:
        raise ValueError("needs at least one value")
    return values


def _some(text: str, kind: type[ValueT]) -> tuple[ValueT, ...]:
    """As `_list`, and may be none."""
    return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",") if part.strip()))
