"""What is counted of one session, or of many."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

from speculation.messages import Verdict


@dataclass(slots=True)
class SessionStats:
    """Counts of one session; see ``SpeculationStats`` in ``generation.proto``."""

    num_steps: int = 0
    num_free_run_steps: int = 0
    num_committed: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_proposed: int = 0
    num_dropped: int = 0
    sum_k: int = 0
    last_k: int = 0
    num_draft_losses: int = 0
    num_target_losses: int = 0
    num_misses: int = 0
    num_caught: int = 0
    steps_by_k: Counter[int] = field(default_factory=Counter)
    """Steps by the cap that they had."""
    q_bytes_received: int = 0
    q_bytes_relayed: int = 0
    steps_by_accepted: Counter[int] = field(default_factory=Counter)
    """Steps with drafted tokens, by how many of those were accepted."""
    num_looked_up: int = 0
    num_looked_up_accepted: int = 0

    def count(self, verdict: Verdict, k: int) -> None:
        """Adds one step that had ``k`` as its cap."""
        self.num_steps += 1
        self.num_free_run_steps += verdict.num_drafted == 0
        self.num_committed += len(verdict.token_ids)
        self.num_drafted += verdict.num_drafted
        self.num_accepted += verdict.num_accepted
        self.num_looked_up += verdict.num_looked_up
        self.num_looked_up_accepted += verdict.num_looked_up_accepted
        self.num_dropped += verdict.num_dropped
        self.num_misses += verdict.missed
        self.num_caught += verdict.caught
        self.sum_k += k
        self.last_k = k
        self.steps_by_k[k] += 1
        if verdict.num_drafted:
            self.steps_by_accepted[verdict.num_accepted] += 1

    def add(self, other: SessionStats) -> None:
        """Adds what another session counted; ``last_k`` is that of the last one added."""
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.last_k = other.last_k

    @property
    def num_wasted(self) -> int:
        """Drafted tokens that draft workers sent and that were not accepted, for whatever reason."""
        return max(0, self.num_proposed - self.num_accepted)

    @property
    def num_drafts(self) -> int:
        """Steps with drafted tokens."""
        return self.num_steps - self.num_free_run_steps

    def num_accepted_at(self, position: int) -> int:
        """Steps that accepted the drafted token at ``position`` of those they verified, from 0."""
        return sum(steps for num_accepted, steps in self.steps_by_accepted.items() if num_accepted > position)

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted tokens verified; 0 if none was."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Committed tokens per step, the target's own included; 0 before the first step."""
        return self.num_committed / self.num_steps if self.num_steps else 0.0

    @property
    def mean_k(self) -> float:
        return self.sum_k / self.num_steps if self.num_steps else 0.0


_SUMMED = tuple(part.name for part in fields(SessionStats) if part.name != "last_k")
