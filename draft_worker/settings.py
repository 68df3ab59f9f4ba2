"""The settings of a draft worker process."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from rpc.worker_settings import WorkerSettings


class DraftWorkerSettings(WorkerSettings):
    """Every field has the environment twin ``OUTRIDER_DRAFT_<FIELD>``."""

    model_config = SettingsConfigDict(env_prefix="OUTRIDER_DRAFT_", frozen=True, extra="forbid")

    flush_tokens: Annotated[int, Field(ge=1)] = 4
    """Most drafted tokens of a session that wait to leave together. Fewer leave when none of the chain has left yet."""
