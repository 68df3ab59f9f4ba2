"""What a request that asks for a trace is told of each step, as seen from here: when, how long, from which drafts.

Times are seconds since the request's arrival, by the coordinator's clock: a verdict's or a proposal's is when it came
in, a hop after it was made. Sessions of requests that ask for none have no `StepTraces`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from speculation.messages import Proposal, StepReport, Verdict

MAX_PROPOSALS = 64
"""Told of for one step; a drafter that sends more of them is not believed to be drafting."""


@dataclass(frozen=True, slots=True)
class ProposalTrace:
    """Drafted tokens came in, the first at ``start`` of the output."""

    at_s: float
    start: int
    num_tokens: int
    is_branch: bool


@dataclass(frozen=True, slots=True)
class StepTrace:
    """A verdict came in, and ``proposals`` since the one before."""

    at_s: float
    step_s: float
    """What the target's step took, by its own clock; all sessions in it together."""
    waited_s: float
    """How long the target had waited for drafts before."""
    num_sessions: int
    num_branch: int
    """The first so many of the accepted tokens are from a branch that had caught a miss."""
    missed: bool
    caught: bool
    proposals: tuple[ProposalTrace, ...]


class BranchRun:
    """Which accepted tokens a branch had ready, by the sequence of verdicts.

    A verdict does not say where a drafted token came from. But after a caught miss everything staged goes on from the
    target's own token, so it was drafted before anybody knew of the miss: that is the branch, and ``num_staged`` its
    length. What the drafter adds behind it later is its main line again.
    """

    def __init__(self) -> None:
        self._stop = 0

    def count(self, verdict: Verdict) -> int:
        """How many of the verdict's accepted tokens, from its first on, are the branch's."""
        num_branch = max(0, min(verdict.num_accepted, self._stop - verdict.start))
        if verdict.missed:
            end = verdict.start + len(verdict.token_ids)
            self._stop = end + verdict.num_staged if verdict.caught else 0
        return num_branch


class StepTraces:
    """Collects the traces of one session; one for each verdict, in their order."""

    def __init__(self, arrived_s: float, num_prompt_tokens: int) -> None:
        self._arrived_s = arrived_s
        self._num_prompt_tokens = num_prompt_tokens
        self._branch = BranchRun()
        self._proposals: list[ProposalTrace] = []
        self._untold: deque[StepTrace] = deque()

    def on_proposal(self, proposal: Proposal, now_s: float) -> None:
        if len(self._proposals) < MAX_PROPOSALS:
            start = proposal.prefix_length - self._num_prompt_tokens
            num_tokens = len(proposal.token_ids)
            self._proposals.append(ProposalTrace(now_s - self._arrived_s, start, num_tokens, proposal.is_branch))

    def on_verdict(self, verdict: Verdict, report: StepReport | None, now_s: float) -> None:
        trace = StepTrace(
            at_s=now_s - self._arrived_s,
            step_s=report.step_s if report else 0.0,
            waited_s=report.waited_s if report else 0.0,
            num_sessions=report.num_sessions if report else 1,
            num_branch=self._branch.count(verdict),
            missed=verdict.missed,
            caught=verdict.caught,
            proposals=tuple(self._proposals),
        )
        self._proposals.clear()
        self._untold.append(trace)

    def take(self) -> StepTrace:
        """The oldest one not taken yet; there is one for each emitted step."""
        return self._untold.popleft()
