"""What each worker will need, and whether it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.doctor.compatibility import Finding, Level


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """One worker's memory, in bytes; without what torch and Python take themselves."""

    role: str
    device: str
    weights_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    free_bytes: int | None
    """On its device before anything was loaded; None where that cannot be told."""

    @property
    def pool_bytes(self) -> int:
        return self.kv_bytes_per_token * self.kv_tokens

    @property
    def needed_bytes(self) -> int:
        return self.weights_bytes + self.pool_bytes


def memory_finding(models: Sequence[ModelMemory]) -> Finding:
    """A model that does not fit alone is a problem; models that fit one by one and not together need two machines."""
    too_large = [model for model in models if model.free_bytes is not None and model.needed_bytes > model.free_bytes]
    if too_large:
        model = too_large[0]
        assert model.free_bytes is not None
        message = (
            f"the {model.role} needs {shown(model.needed_bytes)} on {model.device}, {shown(model.free_bytes)} are "
            f"free: lower --kv-tokens ({shown(model.kv_bytes_per_token)} a token), or use another machine or dtype"
        )
        return Finding("memory", Level.PROBLEM, message)
    if any(model.free_bytes is None for model in models):
        return Finding("memory", Level.WARNING, "what is free cannot be told on this system: compare it yourself")
    return _together(models)


def _together(models: Sequence[ModelMemory]) -> Finding:
    on_device: dict[str, list[ModelMemory]] = {}
    for model in models:
        on_device.setdefault(model.device, []).append(model)
    for device, sharing in on_device.items():
        needed, free = sum(one.needed_bytes for one in sharing), min(one.free_bytes or 0 for one in sharing)
        if needed > free:
            message = (
                f"each fits, but together they need {shown(needed)} on {device} and {shown(free)} are free: "
                "run them on two devices, or lower --kv-tokens"
            )
            return Finding("memory", Level.WARNING, message)
    return Finding("memory", Level.GOOD, "both fit at the same time")


def shown(num_bytes: float) -> str:
    """In binary units, as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if num_bytes >= 100 or unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
