"""Which tokens a branch had ready is told by the sequence of verdicts alone; here against the real target's session."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.step_trace import MAX_PROPOSALS, BranchRun, StepTraces
from speculation.experience import Experience
from speculation.fingerprint import fingerprint
from speculation.messages import OpenTarget, Proposal, Sampling, StepReport, Verdict
from speculation.verifier import VerifierSession

PROMPT = (1, 2)


def target() -> VerifierSession:
    return VerifierSession(OpenTarget(PROMPT, Sampling(), 100, (), 8), 1000, Experience(lookups=None))


def proposal(prefix: Sequence[int], tokens: Sequence[int], is_branch: bool = False) -> Proposal:
    return Proposal(len(prefix), fingerprint(prefix), tuple(tokens), (0.5,) * len(tokens), is_branch)


def step(session: VerifierSession, k: int, says: Sequence[int]) -> Verdict:
    """Verifies up to ``k`` staged tokens where the target says ``says``."""
    drafted = session.drafted(k)
    return session.conclude(drafted, says[: len(drafted) + 1], 0.0)


def missed_and_caught() -> tuple[VerifierSession, BranchRun, list[int]]:
    """The main line says 3 4 5, a branch 3 6 7 8, the target 3 6 7 8 9."""
    session, run = target(), BranchRun()
    session.stage(proposal(PROMPT, [3, 4, 5]), 0.0)
    session.stage(proposal((*PROMPT, 3), [6, 7, 8], is_branch=True), 0.0)
    verdict = step(session, 3, [3, 6])
    assert (verdict.caught, verdict.num_accepted, verdict.num_staged) == (True, 1, 2)
    return session, run, [run.count(verdict)]


def test_what_a_branch_had_ready_after_a_miss_is_the_branchs() -> None:
    session, run, counts = missed_and_caught()
    verdict = step(session, 8, [7, 8, 9])
    assert [*counts, run.count(verdict)] == [0, 2]


def test_what_is_drafted_behind_it_later_is_not() -> None:
    session, run, _ = missed_and_caught()
    session.stage(proposal((*PROMPT, 3, 6, 7, 8), [9, 10]), 0.0)
    verdict = step(session, 8, [7, 8, 9, 10, 11])
    assert (run.count(verdict), verdict.num_accepted) == (2, 4)
    session.stage(proposal(session.token_ids, [12]), 0.0)
    assert run.count(step(session, 8, [12, 13])) == 0


def test_a_long_branch_goes_on_over_several_steps() -> None:
    session, run = target(), BranchRun()
    session.stage(proposal(PROMPT, [4]), 0.0)
    session.stage(proposal(PROMPT, [3, 5, 6, 7, 8], is_branch=True), 0.0)
    counts = [
        run.count(step(session, 1, [3])),
        run.count(step(session, 1, [5, 6])),
        run.count(step(session, 4, [7, 8, 9])),
    ]
    assert counts == [0, 1, 2]  # 6 was staged too, but is the target's own


def test_a_miss_ends_it() -> None:
    session, run, _ = missed_and_caught()
    assert run.count(step(session, 8, [50])) == 0
    session.stage(proposal(session.token_ids, [51]), 0.0)
    assert run.count(step(session, 8, [51, 52])) == 0


def test_each_step_is_told_with_the_proposals_since_the_one_before() -> None:
    traces = StepTraces(arrived_s=10.0, num_prompt_tokens=2)
    traces.on_proposal(proposal(PROMPT, [3, 4]), 10.5)
    traces.on_verdict(Verdict(2, (3, 9), 1, 1, 0, missed=True), StepReport(0.25, 3, 5, waited_s=0.125), 11.0)
    traces.on_verdict(Verdict(4, (5,), 0, 0, 0), None, 12.0)
    first, second = traces.take(), traces.take()
    assert (first.at_s, first.step_s, first.waited_s, first.num_sessions, first.missed) == (1.0, 0.25, 0.125, 3, True)
    [told] = first.proposals
    assert (told.at_s, told.start, told.num_tokens, told.is_branch) == (0.5, 0, 2, False)
    assert (second.at_s, second.proposals) == (2.0, ())


def test_a_drafter_that_sends_without_end_is_not_told_of_without_end() -> None:
    traces = StepTraces(0.0, 0)
    for _ in range(2 * MAX_PROPOSALS):
        traces.on_proposal(proposal(PROMPT, [3]), 1.0)
    traces.on_verdict(Verdict(2, (3,), 0, 0, 0), None, 2.0)
    assert len(traces.take().proposals) == MAX_PROPOSALS
