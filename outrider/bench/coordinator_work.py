"""What a coordinator has done so far, and between two moments."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class CoordinatorWork:
    """Processor time of its process, and frames exchanged with target workers."""

    cpu_s: float
    num_target_steps: int
    num_frames_to_target: int
    num_frames_from_target: int

    def since(self, before: CoordinatorWork) -> CoordinatorWork:
        return CoordinatorWork(
            self.cpu_s - before.cpu_s,
            self.num_target_steps - before.num_target_steps,
            self.num_frames_to_target - before.num_frames_to_target,
            self.num_frames_from_target - before.num_frames_from_target,
        )

    def plus(self, other: CoordinatorWork) -> CoordinatorWork:
        return CoordinatorWork(
            self.cpu_s + other.cpu_s,
            self.num_target_steps + other.num_target_steps,
            self.num_frames_to_target + other.num_frames_to_target,
            self.num_frames_from_target + other.num_frames_from_target,
        )

    @property
    def frames_per_step(self) -> tuple[float, float]:
        """To the target and from it, for each of its steps; 0 without a step."""
        steps = max(1, self.num_target_steps)
        return self.num_frames_to_target / steps, self.num_frames_from_target / steps


WorkMeter: TypeAlias = Callable[[], Awaitable[CoordinatorWork | None]]


async def no_meter() -> CoordinatorWork | None:
    """Where nothing can be told."""
    return None
