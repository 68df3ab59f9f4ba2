"""Settings of ``outrider bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeVar

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from outrider.bench.systems import SYSTEMS
from outrider.settings import StackSettings

ValueT = TypeVar("ValueT", int, float, str)

_MAX_CONCURRENCY: Final = 256


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
    """Tokens of each completion. Unset: 128, or 48 with --quick."""
    repeats: int | None = Field(default=None, ge=1, le=1000)
    """Times that every prompt is completed by every system. Unset: 2, or 1 with --quick."""
    systems: str = ",".join(SYSTEMS)
    """What to measure; plain decoding always runs beside it."""
    concurrency: str = "1"
    """Requests at a time."""
    temperatures: str = "0,0.8"
    """Temperatures; 0 is greedy, and what the figures are taken from."""
    prompt_file: Path | None = None
    """JSON file with a list "prompts" of texts. Unset: the demo pair's held-out prompts."""
    as_json: Path | None = Field(default=None, validation_alias="OUTRIDER_BENCH_JSON")
    """Write everything measured to this file too."""

    @field_validator("systems")
    @classmethod
    def _check_systems(cls, text: str) -> str:
        unknown = [name for name in _list(text, str) if name not in SYSTEMS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no system; known are {', '.join(SYSTEMS)}")
        return text

    @field_validator("concurrency")
    @classmethod
    def _check_concurrency(cls, text: str) -> str:
        if not all(1 <= value <= _MAX_CONCURRENCY for value in _list(text, int)):
            raise ValueError(f"every value has to be in [1, {_MAX_CONCURRENCY}]")
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
        return self.max_tokens or (48 if self.quick else 128)

    @property
    def num_repeats(self) -> int:
        return self.repeats or (1 if self.quick else 2)

    @property
    def system_list(self) -> tuple[str, ...]:
        return _list(self.systems, str)

    @property
    def concurrency_list(self) -> tuple[int, ...]:
        return _list(self.concurrency, int)

    @property
    def temperature_list(self) -> tuple[float, ...]:
        return _list(self.temperatures, float)


def _list(text: str, kind: type[ValueT]) -> tuple[ValueT, ...]:
    """The distinct values of a comma-separated list, in order. Raises `ValueError`."""
    values = tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",") if part.strip()))
    if not values:
        raise ValueError("needs at least one value")
    return values
