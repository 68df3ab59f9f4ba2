"""What a draft worker drafts next."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from speculation.draft_schedule import IDLE_BELOW, DraftSchedule
from speculation.drafter import DrafterSession
from speculation.guesses import Guess
from speculation.messages import OpenDraft, Sampling


@dataclass(frozen=True, slots=True)
class Session:
    drafter: DrafterSession


def drafted_alone(max_branches: int, lookahead: int) -> int:
    """Tokens of the main line that one session gets from a drafter that is never sure of anything."""
    schedule: DraftSchedule[Session] = DraftSchedule(64)
    session = Session(schedule.open(OpenDraft((1,), Sampling(), lookahead, 0, max_branches), 50, 100))
    while entries := schedule.next([session]):
        for entry in entries:
            entry.line.num_cached += len(entry.token_ids)
            session.drafter.drafted(entry.line, Guess(2, 0.0, ()))
        schedule.report(entries, 0.001)
    assert not schedule.has_work([session])
    return len(session.drafter.main)


@pytest.mark.parametrize("lookahead", [6, 20])
def test_without_branches_the_whole_lookahead_is_drafted(lookahead: int) -> None:
    """A target that takes turns waits until all of it is there."""
    assert drafted_alone(0, lookahead) == lookahead


def test_with_branches_what_is_hardly_ever_reached_is_left() -> None:
    num_drafted = drafted_alone(2, 20)
    assert num_drafted < 20
    assert 0.5**num_drafted < IDLE_BELOW
