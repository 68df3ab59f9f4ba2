"""The settings of a target worker process."""

from __future__ import annotations

from pydantic_settings import SettingsConfigDict

from rpc.worker_settings import WorkerSettings


class TargetWorkerSettings(WorkerSettings):
    """Every field has the environment twin ``OUTRIDER_TARGET_<FIELD>``."""

    model_config = SettingsConfigDict(env_prefix="OUTRIDER_TARGET_", frozen=True, extra="forbid")
