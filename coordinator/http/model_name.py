"""The name by which clients know the model."""

from __future__ import annotations

from coordinator.coordinator import Coordinator
from rpc.errors import ModelNotFound

MAX_SHOWN_CHARS = 60


class ModelName:
    """The configured name, or the model's own; of a path only its last part, for the rest is nobody's business."""

    def __init__(self, coordinator: Coordinator, configured: str = "") -> None:
        self._coordinator = coordinator
        self._configured = configured

    def shown(self) -> str:
        """Raises `Unavailable` before the first target is known."""
        return self._configured or last_part(self._own())

    def check(self, name: str) -> None:
        """Raises `ModelNotFound` unless that is the served model; empty is any."""
        if name not in ("", self.shown(), self._own()):
            told = name if len(name) <= MAX_SHOWN_CHARS else f"{name[:MAX_SHOWN_CHARS]}..."
            raise ModelNotFound(f"model {told!r} is not served here; use {self.shown()!r} or leave it empty")

    def _own(self) -> str:
        return self._coordinator.deployment().model.name


def last_part(name: str) -> str:
    """A hub name as it is, of a path the last part."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1  # a hub name is owner/name
    return name.rstrip("/").rpartition("/")[2] if is_path else name
