"""Frames between a coordinator and its workers, counted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class FrameCount:
    """Frames written to, and read from, all workers of one kind."""

    num_sent: int = 0
    num_received: int = 0
    num_sent_bytes: int = 0
    num_received_bytes: int = 0
    """Messages as serialized, without what HTTP/2 puts around them."""


@dataclass(slots=True)
class Traffic:
    """Since the coordinator started; counted by its clients, so all zero for workers in the same process."""

    target: FrameCount = field(default_factory=FrameCount)
    draft: FrameCount = field(default_factory=FrameCount)
    num_target_steps: int = 0
    """Steps that targets told of: those with news for this coordinator."""
