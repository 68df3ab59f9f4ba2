"""The settings that both kinds of worker have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import SettingsConfigDict

from telemetry.settings import TelemetrySettings


def check_model_name(name: str) -> str:
    """Refuses what is meant as a folder and is none of a model, before whatever loads models is imported.

    What else cannot be loaded is found out when it is. Raises ValueError.
    """
    folder = Path(name)
    if folder.is_dir() and name:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name!r} is a folder without a config.json; give the folder of a Hugging Face model")
    elif name.startswith((".", "/", "~")) or folder.is_file():
        raise ValueError(f"{name!r} is not a folder; give the folder of a Hugging Face model, or its name on the hub")
    return name


ModelName = Annotated[str, AfterValidator(check_model_name)]
"""Folder or hub name of a model."""


class WorkerSettings(TelemetrySettings):
    """What to load, where to run it, where to listen."""

    model_config = SettingsConfigDict(use_attribute_docstrings=True)

    model: ModelName
    """Folder or hub name of a Hugging Face causal language model."""
    host: str = "127.0.0.1"
    """Interface to listen on; 0.0.0.0 is all of them."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 takes any free port."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:N"; auto is CUDA where there is one."""
    dtype: str = "auto"
    """"float32", "bfloat16", "float16"; auto is float32 on CPU and bfloat16 elsewhere."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of the model; 0 leaves it to torch."""
    kv_tokens: Annotated[int, Field(ge=16)] = 16_384
    """KV positions of all sessions together; allocated at start."""
    graphs: bool = True
    """On CUDA, record small steps as CUDA graphs when starting; they run several times faster."""
    lookup: bool = True
    """Prompt lookup: where the last tokens stood earlier in a sequence, verify what followed them there: the target
    behind the drafts, the drafter to draft several tokens in a step. Changes no token."""
    max_step_tokens: Annotated[int, Field(ge=16)] = 512
    """Most tokens in one forward pass; longer prompts are prefilled in chunks."""
    shutdown_grace_s: Annotated[float, Field(ge=0)] = 5.0
    """Seconds that streams under way get when the worker is told to stop."""
