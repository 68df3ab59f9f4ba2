"""The two models, loaded as workers load them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from coordinator.vocabulary import load_served_model
from inference import (
    ModelDescription,
    ModelLoadError,
    PagedRuntime,
    load_model,
    load_tokenizer,
)
from outrider.doctor.compatibility import Described
from outrider.doctor.memory import ModelMemory
from outrider.doctor.rounding import Rounding
from outrider.failures import BadUsage
from rpc.worker_process import describe_model


@dataclass(frozen=True, slots=True)
class Examined:
    """One model of the pair, in memory."""

    runtime: PagedRuntime
    description: ModelDescription
    described: Described
    memory: ModelMemory

    @property
    def limit(self) -> int:
        """Only ids below it are drawn."""
        return self.described.served.info.tokenizer_size

    @property
    def tokenizer(self) -> Tokenizer:
        return self.described.served.tokenizer

    @property
    def rounding(self) -> Rounding:
        """What rounding does to its logits."""
        facts = self.description
        return Rounding(facts.dtype, facts.num_layers, facts.hidden_size)


def load(
    role: str, name: str, *, device: str, dtype: str, kv_tokens: int, on_progress: Callable[[str], None]
) -> Examined:
    """Raises `BadUsage` for what is no model, or cannot be loaded."""
    try:
        tokenizer = load_tokenizer(name)
        free_bytes = _free_bytes(device)
        loaded = load_model(
            name,
            device=device,
            dtype=dtype,
            kv_tokens=kv_tokens,
            compiled=role == "draft",
            on_progress=lambda stage: on_progress(f"{role}: {stage}"),
        )
    except ModelLoadError as error:
        raise BadUsage(f"{role}: {error}") from error
    facts, runtime = loaded.description, loaded.runtime
    info = describe_model(facts, tokenizer.json)
    memory = ModelMemory(
        role=role,
        device=facts.device,
        weights_bytes=facts.memory_bytes - runtime.num_kv_bytes,
        kv_bytes_per_token=runtime.num_kv_bytes // runtime.num_free_tokens,
        kv_tokens=runtime.num_free_tokens,
        free_bytes=free_bytes,
    )
    described = Described(load_served_model(info, tokenizer.json.encode()), tokenizer.chat_template or None)
    return Examined(runtime, facts, described, memory)


def _free_bytes(device: str) -> int | None:
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return int(torch.cuda.mem_get_info(None if device == "auto" else device)[0])
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found.group(1)) if found else None
