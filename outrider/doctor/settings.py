"""Settings of ``outrider doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from rpc.worker_settings import ModelName

_MAX_TEMPERATURE: Final = 100


class DoctorSettings(BaseSettings):
    """``outrider doctor``."""

    model_config = SettingsConfigDict(
        env_prefix="OUTRIDER_DOCTOR_", frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True
    )

    target: ModelName = ""
    """Target model: a directory or a Hugging Face name. Both empty: the demo pair."""
    draft: ModelName = ""
    """Draft model: a directory or a Hugging Face name. Both empty: the demo pair."""
    device: str = "auto"
    """Where both models run: auto, cpu, cuda, cuda:1 ..."""
    dtype: str = "auto"
    """Both models' weights: auto, float32, bfloat16, float16."""
    threads: int = Field(default=0, ge=0)
    """CPU threads. 0: as many as the target worker of a local stack has."""
    kv_tokens: int = Field(default=16_384, ge=16)
    """KV positions of each model, as a worker has them; allocated at start."""
    prompts: int = Field(default=4, ge=1, le=1000)
    """Sample prompts, from the first on."""
    max_tokens: int = Field(default=64, ge=8, le=4096)
    """Tokens generated after each."""
    temperatures: str = "0,0.8"
    """Temperatures, separated by commas; 0 is greedy."""
    max_k: int = Field(default=8, ge=1, le=64)
    """Greatest K."""
    latency_ms: float = Field(default=0.0, ge=0, lt=10_000)
    """Milliseconds, each way, between drafter and coordinator, for the prediction."""
    prompt_file: Path | None = None
    """JSON file with a list "prompts" of texts. Unset: the demo pair's held-out prompts, which are Python code."""
    as_json: bool = Field(default=False, validation_alias="OUTRIDER_DOCTOR_JSON")
    """Print one JSON object and nothing else."""

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, text: str) -> str:
        if not all(0 <= value <= _MAX_TEMPERATURE for value in _temperatures(text)):
            raise ValueError(f"every value has to be in [0, {_MAX_TEMPERATURE}]")
        return text

    @property
    def temperature_list(self) -> tuple[float, ...]:
        return _temperatures(self.temperatures)


def _temperatures(text: str) -> tuple[float, ...]:
    """The distinct values, in order. Raises `ValueError`."""
    values = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    if not values:
        raise ValueError("needs at least one value")
    return values
