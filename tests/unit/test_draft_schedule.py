"""What a draft worker drafts next."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from speculation.draft_schedule import IDLE_BELOW, MAX_DEPTH, MAX_DRAWN, DraftSchedule
from speculation.drafter import DrafterSession
from speculation.guesses import Guess
from speculation.messages import Commit, OpenDraft, Sampling


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
            entry.conclude([Guess(2, 0.0, ())] * entry.num_draws)
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


def says(prefix: list[int]) -> Guess:
    """A draft model that repeats itself with a period of five, but for every 17th token."""
    return Guess(40 + len(prefix) % 7 if len(prefix) % 17 == 0 else len(prefix) % 5, 2.0, ())


@pytest.mark.parametrize(("step_s", "row_s"), [(0.001, 0.00001), (0.0, 0.001)])
def test_a_drafter_that_looks_up_drafts_the_same_tokens_in_fewer_steps(step_s: float, row_s: float) -> None:
    """Where another row costs as much as another step, it looks nothing up."""

    def run(looks_up: bool) -> tuple[list[int], int]:
        schedule: DraftSchedule[Session] = DraftSchedule(64, looks_up)
        prompt = tuple(says(list(range(n))).token_id for n in range(20))
        session = Session(schedule.open(OpenDraft(prompt, Sampling(), 12), 50, 400))
        drafter, chain, num_steps = session.drafter, list[int](), 0
        while len(chain) < 200:
            while entries := schedule.next([session]):
                for entry in entries:
                    before = drafter.sequence(entry.line)
                    entry.line.num_cached += len(entry.token_ids)
                    num_wrong = entry.conclude([says([*before, *entry.verified[:n]]) for n in range(entry.num_draws)])
                    assert 0 <= num_wrong <= entry.num_looked_up
                    assert len(drafter.uncached(drafter.main)) == 1
                schedule.report(entries, step_s + row_s * sum(1 + entry.num_looked_up for entry in entries))
                num_steps += 1
            assert len(drafter.main) <= 12
            chain += drafter.main.token_ids
            drafter.commit(Commit(drafter.num_committed, tuple(drafter.main.token_ids)))
        return chain, num_steps

    chain, num_steps = run(looks_up=True)
    plain_chain, num_plain_steps = run(looks_up=False)
    assert chain == plain_chain
    assert num_steps < num_plain_steps / 2 if step_s else num_steps == num_plain_steps


def test_a_step_is_no_larger_than_allowed() -> None:
    schedule: DraftSchedule[Session] = DraftSchedule(4)
    sessions = [Session(schedule.open(OpenDraft((1, 2, 1, 2), Sampling(), 20), 50, 400)) for _ in range(2)]
    for _ in range(20):
        entries = schedule.next(sessions)
        assert sum(len(entry.token_ids) + entry.num_looked_up for entry in entries) <= 4
        for entry in entries:
            entry.line.num_cached += len(entry.token_ids)
            if entry.draws:
                last = [entry.token_ids[-1], *entry.verified]
                entry.conclude([Guess(3 - token, 3.0, ()) for token in last])
        schedule.report(entries, 0.001)


def test_lines_grow_by_several_tokens_as_far_as_all_of_them_may() -> None:
    schedule: DraftSchedule[Session] = DraftSchedule(64, looks_up=False)

    def depth(*lookaheads: int, prompt_length: int = 1) -> int:
        prompt = tuple(range(prompt_length))
        sessions = [Session(schedule.open(OpenDraft(prompt, Sampling(), one), 50, 100)) for one in lookaheads]
        return schedule.depth(schedule.next(sessions))

    assert depth(20) == MAX_DEPTH
    assert depth(20, 20) == MAX_DEPTH
    assert depth(20, 2) == 2
    assert depth(20, 1) == 1
    assert depth(*[20] * (MAX_DRAWN // 2)) == 2
    assert depth(*[20] * (2 * MAX_DRAWN)) == 1
    assert depth(20, prompt_length=60) == MAX_DEPTH
    assert depth(20, prompt_length=70) == 1  # a part of a prompt has nothing drawn behind it
    assert depth(20, 20, prompt_length=99) == 1  # the context ends


def test_nothing_is_drawn_in_a_row_where_lookups_are_verified() -> None:
    schedule: DraftSchedule[Session] = DraftSchedule(64)
    session = Session(schedule.open(OpenDraft((1, 2, 3, 4) * 3, Sampling(), 20), 50, 400))
    depths: dict[bool, set[int]] = {True: set(), False: set()}
    for _ in range(20):
        while entries := schedule.next([session]):
            [entry] = entries
            depths[entry.num_looked_up > 0].add(schedule.depth(entries))
            before = session.drafter.sequence(entry.line)
            entry.line.num_cached += len(entry.token_ids)
            entry.conclude([Guess(1 + (len(before) + n) % 4, 9.0, ()) for n in range(entry.num_draws)])
            schedule.report(entries, 0.001)
        session.drafter.commit(Commit(session.drafter.num_committed, tuple(session.drafter.main.token_ids)))
    assert depths[True] == {1}
    assert MAX_DEPTH in depths[False]
