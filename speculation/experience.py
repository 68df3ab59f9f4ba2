"""What a target worker has learned of its drafts, whoever they came from."""

from __future__ import annotations

from dataclasses import dataclass, field

from speculation.acceptance import DEPLOYMENT_WINDOW_STEPS, AcceptanceProfile
from speculation.confidence import ConfidenceStatistics
from speculation.pace import DraftPace
from speculation.prompt_lookup import LookupStatistics


@dataclass(frozen=True, slots=True)
class Experience:
    """Sessions start from it and add to it."""

    profile: AcceptanceProfile = field(default_factory=lambda: AcceptanceProfile(window_steps=DEPLOYMENT_WINDOW_STEPS))
    """How often drafted tokens are right, by depth."""
    confidence: ConfidenceStatistics = field(default_factory=ConfidenceStatistics)
    """The same by how sure the drafter was."""
    pace: DraftPace = field(default_factory=DraftPace)
    """When drafts come."""
    lookups: LookupStatistics | None = field(default_factory=LookupStatistics)
    """How often looked-up tokens are right; None: nothing is looked up."""
