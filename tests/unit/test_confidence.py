"""What the target makes of how sure a drafter says it is: calibrated, never believed, and of use to the planner."""

from __future__ import annotations

import math

import pytest

from speculation.acceptance import AcceptanceProfile
from speculation.confidence import EDGES, ConfidenceStatistics
from speculation.cost import StepCostModel
from speculation.draft_distribution import one_hot
from speculation.experience import Experience
from speculation.fingerprint import fingerprint
from speculation.messages import Method, OpenTarget, Proposal, Sampling, SessionId, StepReport
from speculation.planner import Candidate, StepPlanner
from speculation.verifier import VerifierSession

USUAL = (0.8, 0.6, 0.45, 0.4)


def experienced(confidence: float, num_right: int, num_wrong: int) -> ConfidenceStatistics:
    found = ConfidenceStatistics()
    for is_right in [True] * num_right + [False] * num_wrong:
        found.observe(confidence, is_right)
    return found


def test_without_evidence_everything_is_as_usual() -> None:
    survival = ConfidenceStatistics().survival([0.99, 0.1, None], USUAL)
    assert survival == pytest.approx(USUAL)


@pytest.mark.parametrize("said", [0.99, 0.01, -7.0, 1e30, math.inf, math.nan])
def test_what_a_drafter_says_only_sorts_its_tokens(said: float) -> None:
    """Three in four of those were right, whatever was said."""
    found = experienced(said, 300, 100)
    assert found.survival([said], USUAL)[0] == pytest.approx(0.75, abs=0.03)
    other = EDGES[3]
    assert found.survival([other], USUAL)[0] == pytest.approx(0.8)


def test_behind_an_unsure_token_it_goes_on_as_usual() -> None:
    found = experienced(0.55, 100, 100)
    survival = found.survival([0.55], USUAL)
    rate = survival[0]
    assert rate == pytest.approx(0.5, abs=0.05)
    assert survival == pytest.approx([rate * usual / USUAL[0] for usual in USUAL])


def test_a_session_starts_from_the_workers_and_tells_it() -> None:
    worker = experienced(0.55, 50, 50)
    session = ConfidenceStatistics(worker)
    assert session.survival([0.55], USUAL) == pytest.approx(worker.survival([0.55], USUAL))
    for _ in range(200):
        session.observe(0.55, True)
    assert session.survival([0.55], USUAL)[0] > worker.survival([0.55], USUAL)[0] > 0.6
    assert ConfidenceStatistics(worker).survival([0.55], USUAL) == worker.survival([0.55], USUAL)


def test_nothing_survives_what_never_does() -> None:
    assert experienced(0.9, 0, 50).survival([0.9, 0.9], (0.0, 0.0)) == (0.0, 0.0)


# -- at the session ---------------------------------------------------------------------------------------------


def session(experience: Experience, sampling: Sampling | None = None) -> VerifierSession:
    return VerifierSession(OpenTarget((1,), sampling or Sampling(), 10_000, (), 4), 50, experience)


def stage(target: VerifierSession, chain: list[int], confidences: list[float]) -> None:
    prefix = list(target.token_ids)
    target.stage(Proposal(len(prefix), fingerprint(prefix), tuple(chain), tuple(confidences)), 0.0)


def test_learns_of_decided_tokens_though_no_step_took_them() -> None:
    """Or what is left out for being unsure would stay so for ever."""
    experience = Experience(lookups=None)
    target = session(experience)
    usual = experience.profile.survival(1)[0]
    for _ in range(100):
        stage(target, [2, 3], [0.9, 0.55])
        target.conclude([2], [2, 3], 0.0)
    assert experience.confidence.survival([0.55], [usual])[0] > 0.9


def test_a_token_behind_a_wrong_one_is_no_evidence() -> None:
    experience = Experience(lookups=None)
    target = session(experience)
    for _ in range(100):
        stage(target, [2, 3], [0.55, 0.9])
        target.conclude([2, 3], [4, 3, 5], 0.0)
    assert experience.confidence.survival([0.9], [0.7])[0] == pytest.approx(0.7)
    assert experience.confidence.survival([0.55], [0.7])[0] < 0.2


def test_a_step_ends_before_what_the_drafter_doubts() -> None:
    """Two chains as long, one of them unsure at its second token: the row goes to the other."""
    experience = Experience(lookups=None)
    for _ in range(400):
        experience.confidence.observe(0.97, True)
        experience.confidence.observe(0.55, False)
        experience.profile.observe(4, 2)
    sure, unsure = session(experience), session(experience)
    stage(sure, [2, 3, 4, 5], [0.97] * 4)
    stage(unsure, [2, 3, 4, 5], [0.97, 0.55, 0.97, 0.97])
    costs = StepCostModel()
    for num_tokens in range(2, 12):
        costs.observe(StepReport(0.010 + 0.001 * num_tokens, 2, num_tokens, 0.0))
    candidates = [
        Candidate(SessionId(index), one.num_staged, one.k, one.profile.survival(4), None, survival_now=one.survival)
        for index, one in enumerate((sure, unsure))
    ]
    assert StepPlanner(costs, 100).plan(candidates, 0.0, 0.0).num_drafted == {0: 4, 1: 1}


def test_by_ratio_it_does_not_matter_how_sure_the_drafter_was() -> None:
    """How many tokens a step takes must not depend on which they are."""
    experience = Experience(lookups=None)
    target = session(experience, Sampling(1.0, seed=5, method=Method.REJECTION, draft_top_n=4))
    for _ in range(200):
        experience.confidence.observe(0.55, False)
    proposal = Proposal(1, fingerprint([1]), (2, 3), (0.55, 0.55), distributions=(one_hot(2), one_hot(3)))
    target.stage(proposal, 0.0)
    assert target.num_staged == 2
    assert target.survival == AcceptanceProfile(experience.profile).survival(4)


def test_fewer_confidences_than_tokens_or_more_do_no_harm() -> None:
    target = session(experience := Experience(lookups=None))
    usual = experience.profile.survival(4)
    stage(target, [2, 3, 4], [0.9])
    assert target.num_staged == 3
    assert target.survival == pytest.approx(usual)
    other = session(experience)
    stage(other, [2], [0.9] * 300)
    assert other.num_staged == 1
