"""The simulator: tokens as in plain decoding whatever the setting, and rates that can be worked out by hand."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.simulator import (
    AcceptanceByRun,
    AcceptanceTraces,
    Costs,
    Latencies,
    Load,
    RecordedText,
    Replay,
    Report,
    Scenario,
    ideal_of,
    merged,
    plain_of,
    session_seed,
    simulate,
)
from speculation.simulator.clock import VirtualClock
from speculation.simulator.links import Link
from speculation.simulator.tokens import Acceptance, TokenProcess

STREAM = Scenario(
    target=Costs(0.028, 0.0002),
    draft=Costs(0.003, 0.00001),
    acceptance=AcceptanceByRun((0.75,)),
    latencies=Latencies(draft_s=0.005, target_s=0.0005, client_s=0.002),
    coordinator_s=0.0002,
    load=Load(num_sessions=8, num_output_tokens=64),
)

loads = st.builds(
    Load,
    num_sessions=st.integers(1, 6),
    num_warm_up=st.integers(0, 2),
    concurrency=st.integers(1, 4),
    arrivals_per_s=st.sampled_from([0.0, 3.0]),
    in_batches=st.booleans(),
    num_prompt_tokens=st.integers(1, 9),
    num_output_tokens=st.integers(1, 30),
)
scenarios = st.builds(
    Scenario,
    target=st.builds(Costs, st.floats(0.001, 0.05), st.floats(0.0, 0.01), st.floats(0.0, 0.002), st.floats(0.0, 0.001)),
    draft=st.builds(Costs, st.floats(0.0, 0.03), st.floats(0.0, 0.001)),
    acceptance=st.builds(AcceptanceByRun, st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4).map(tuple)),
    latencies=st.builds(
        Latencies, st.floats(0.0, 0.01), st.floats(0.0, 0.05), st.floats(0.0, 0.01), st.sampled_from([0.0, 0.5])
    ),
    coordinator_s=st.sampled_from([0.0, 0.0003]),
    load=loads,
    policy=st.sampled_from([None, "fixed", "threshold", "goodput"]),
    max_k=st.integers(0, 8),
    turns=st.booleans(),
    max_lookahead=st.integers(0, 20),
    max_branches=st.integers(0, 5),
    num_targets=st.integers(1, 2),
    num_drafters=st.integers(0, 2),
    max_sessions=st.integers(1, 3),
    max_step_tokens=st.sampled_from([16, 512]),
    seed=st.integers(0, 3),
)


@settings(max_examples=150, deadline=None)
@given(scenarios)
def test_every_session_says_what_plain_decoding_says(scenario: Scenario) -> None:
    said: dict[int, Sequence[int]] = {}
    report = simulate(scenario, said.__setitem__)

    load, tokens = scenario.load, TokenProcess(scenario.acceptance)
    assert report.num_sessions == load.num_sessions
    assert len(said) == load.num_sessions + load.num_warm_up
    for seed, found in said.items():
        assert found == tokens.plain(seed, load.num_prompt_tokens, load.num_output_tokens)
    assert report.num_tokens == load.num_sessions * load.num_output_tokens
    assert 0 <= report.num_accepted <= report.num_drafted <= report.num_proposed
    assert report.num_accepted + report.num_dropped <= report.num_proposed
    assert report.num_steps + report.num_accepted >= report.num_tokens
    assert report.num_frames > 0


def test_a_wrong_token_would_derail_what_follows() -> None:
    tokens = TokenProcess(AcceptanceByRun((0.5,)))
    line = tokens.plain(7, 4, 30)
    num_strayed = 0
    for index, last in enumerate(line[:-2]):
        guess = tokens.guess(7, 5 + index, last).token_id
        if guess != line[index + 1]:
            num_strayed += 1
            assert tokens.target(7, 6 + index, guess) != line[index + 2]
    assert num_strayed > 5


def test_the_seed_alone_decides() -> None:
    jittery = replace(STREAM, latencies=replace(STREAM.latencies, jitter=0.5))
    assert simulate(jittery) == simulate(jittery)
    assert simulate(jittery) != simulate(replace(jittery, seed=1))


def test_plain_decoding_takes_one_step_per_token() -> None:
    scenario = replace(STREAM, target=Costs(0.02, overhead_s=0.005), latencies=Latencies(), coordinator_s=0.0)
    report = simulate(plain_of(scenario))
    assert report.tokens_per_s == pytest.approx(1 / 0.025, rel=1e-3)
    assert report.num_steps == report.num_tokens == report.num_free_runs
    assert report.num_drafted == report.draft_steps == 0


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("k", [1, 4])
def test_free_drafts_give_the_length_of_the_formula(acceptance: float, k: int) -> None:
    """Leviathan's (1 - a^(k+1)) / (1 - a), arXiv 2211.17192, eq. 1."""
    load = Load(num_sessions=4, num_output_tokens=2000, num_prompt_tokens=1)
    scenario = replace(STREAM, acceptance=AcceptanceByRun((acceptance,)), max_k=k, load=load, target=Costs(0.02))
    report = simulate(ideal_of(scenario))
    expected = (1 - acceptance ** (k + 1)) / (1 - acceptance) if acceptance < 1 else k + 1
    if acceptance == 0.0:  # the planner leaves out what never pays
        assert report.acceptance_length == 1.0
    else:
        assert report.acceptance_length == pytest.approx(expected, rel=0.03)
        assert report.tokens_per_s == pytest.approx(report.acceptance_length / 0.02, rel=0.01)


@pytest.mark.parametrize("policy", ["fixed", "threshold", "goodput"])
@pytest.mark.parametrize("latency_s", [0.0, 0.005, 0.02])
def test_nothing_beats_the_ideal_nor_falls_below_plain(policy: str, latency_s: float) -> None:
    scenario = replace(STREAM, policy=policy, latencies=Latencies(draft_s=latency_s))
    stream = simulate(scenario).tokens_per_s
    assert simulate(ideal_of(scenario)).tokens_per_s >= 0.99 * stream
    assert stream >= 0.97 * simulate(plain_of(scenario)).tokens_per_s


def test_streaming_beats_taking_turns_the_more_the_further_away() -> None:
    def gain(latency_s: float) -> float:
        scenario = replace(STREAM, policy="fixed", latencies=Latencies(draft_s=latency_s))
        return simulate(scenario).tokens_per_s / simulate(replace(scenario, turns=True)).tokens_per_s

    assert 1.0 < gain(0.001) < gain(0.005) < gain(0.02) < gain(0.05)


def test_acceptance_by_run_is_what_the_profile_says() -> None:
    tokens = TokenProcess(
        AcceptanceByRun(
            (
                0.9,
                0.6,
                0.3,
            )
        )
    )
    tried, right = [0] * 3, [0] * 3
    run, last = 0, tokens.prompt(5, 1)[-1]
    for position in range(1, 30_000):
        token_id, guess = tokens.target(5, position, last), tokens.guess(5, position, last).token_id
        depth = min(run, 2)
        tried[depth] += 1
        right[depth] += guess == token_id
        run, last = run + 1 if guess == token_id else 0, token_id
    assert [r / t for r, t in zip(right, tried, strict=True)] == pytest.approx([0.9, 0.6, 0.3], abs=0.03)


def test_runners_up_are_right_as_often_as_said_and_small_gaps_are_misses() -> None:
    tokens = TokenProcess(AcceptanceByRun((0.75,)), (0.6, 0.2))
    last, ranks, small, large = tokens.prompt(5, 1)[-1], Counter[int](), Counter[bool](), Counter[bool]()
    for position in range(1, 20_000):
        token_id, guess = tokens.target(5, position, last), tokens.guess(5, position, last)
        choices = [guess.token_id, *(runner_up.token_id for runner_up in guess.runners_up)]
        assert len(set(choices)) == 3
        ranks[choices.index(token_id) if token_id in choices else 3] += 1
        small[guess.token_id == token_id] += guess.gap < 0.5
        large[guess.token_id == token_id] += guess.gap > 3.0
        last = token_id
    shares = [ranks[rank] / ranks.total() for rank in range(4)]
    assert shares == pytest.approx([0.75, 0.15, 0.05, 0.05], abs=0.02)
    assert 0.4 < small[True] / small.total() < 0.6
    assert large[True] / large.total() > 0.95


def test_branches_catch_misses() -> None:
    longer = replace(STREAM, load=Load(num_sessions=8, num_output_tokens=200))
    with_branches, without = simulate(longer), simulate(replace(longer, max_branches=0))
    assert without.num_caught == 0
    assert with_branches.caught_share > 0.15
    assert with_branches.tokens_per_s > 1.1 * without.tokens_per_s


FORESEEN = (True, False, False, True)


@pytest.mark.parametrize(
    "acceptance",
    [AcceptanceTraces({9: FORESEEN}, 3), Replay({9: RecordedText((1, 2, 3), (4, 4, 4, 4), FORESEEN)}, 3)],
)
def test_traces_are_replayed(acceptance: Acceptance) -> None:
    tokens = TokenProcess(acceptance)
    line = [tokens.prompt(9, 3)[-1], *tokens.plain(9, 3, 8)]
    found = [tokens.guess(9, 3 + index, line[index]).token_id == line[index + 1] for index in range(8)]
    assert found == [*FORESEEN] * 2


def replayed(text: RecordedText, num_prompt_tokens: int, load: Load) -> Scenario:
    """Every session says ``text``."""
    load = replace(load, num_prompt_tokens=num_prompt_tokens)
    seeds = [session_seed(STREAM.seed, index) for index in range(load.num_warm_up + load.num_sessions)]
    return replace(STREAM, acceptance=Replay(dict.fromkeys(seeds, text), num_prompt_tokens), load=load)


recordings = st.integers(1, 40).flatmap(
    lambda length: st.builds(
        RecordedText,
        prompt=st.lists(st.integers(0, 3), max_size=9).map(tuple),
        output=st.tuples(*[st.integers(0, 3)] * length),
        foreseen=st.tuples(*[st.booleans()] * length),
    )
)


@settings(max_examples=100, deadline=None)
@given(recordings, st.integers(1, 9), st.sampled_from(["fixed", "threshold", "goodput"]), st.integers(0, 8))
def test_a_replay_says_the_recorded_text(text: RecordedText, num_prompt_tokens: int, policy: str, k: int) -> None:
    load = Load(num_sessions=3, num_output_tokens=len(text.output))
    scenario = replace(replayed(text, num_prompt_tokens, load), policy=policy, max_k=k)
    said: dict[int, Sequence[int]] = {}
    simulate(scenario, said.__setitem__)

    tokens = TokenProcess(scenario.acceptance)
    assert len(said) == load.num_sessions
    for seed, found in said.items():
        assert found == [token_id << 5 for token_id in text.output]
        assert found == tokens.plain(seed, num_prompt_tokens, load.num_output_tokens)


def test_a_replay_repeats_what_the_real_text_repeats() -> None:
    text = RecordedText(prompt=(7, 8, 9), output=(8, 9, 4), foreseen=(True, False, True))
    tokens = TokenProcess(Replay({9: text}, num_prompt_tokens=2))
    assert [token_id >> 5 for token_id in tokens.prompt(9, 2)] == [8, 9]
    once, again = tokens.plain(9, 2, 3), tokens.plain(9, 2, 6)[3:]
    assert (*tokens.prompt(9, 2), *once[:2]) == (*once[:2], *once[:2])
    assert [token_id >> 5 for token_id in again] == [8, 9, 4]
    assert not set(once) & set(again)  # beyond its end nothing can be looked up
    longer = TokenProcess(Replay({9: text}, num_prompt_tokens=6)).prompt(9, 6)
    assert longer[3:] == tuple(token_id << 5 for token_id in text.prompt)
    assert len(set(longer)) == 6


def test_a_wrong_token_derails_a_replay_even_if_the_text_has_it_elsewhere() -> None:
    text = RecordedText(prompt=(1,), output=(2, 3, 4, 5), foreseen=(True, False, True, True))
    tokens = TokenProcess(Replay({9: text}, num_prompt_tokens=1))
    two, three, four, five = tokens.plain(9, 1, 4)
    assert tokens.target_draws(9, 2, two, [three, four]) == [three, four, five]
    assert tokens.target_draws(9, 2, two, [two])[1] & 1
    guess = tokens.guess(9, 2, two).token_id
    assert guess in (1 << 5, two), "a word of the text, and not the right one"
    after = tokens.target(9, 3, guess)
    assert after & tokens.target(9, 4, after) & 1


@pytest.mark.parametrize("foreseen", [(False,) * 120, (True, True, False) * 40])
@pytest.mark.parametrize("policy", ["fixed", "goodput"])
def test_a_text_that_repeats_itself_takes_fewer_steps(foreseen: tuple[bool, ...], policy: str) -> None:
    """With a drafter that is always wrong too, though K is 0 then."""
    prompt, load = tuple(range(1000, 1020)), Load(num_sessions=4, num_warm_up=4, num_output_tokens=120)
    distinct, repeating = (
        simulate(replace(replayed(RecordedText(prompt, output, foreseen), len(prompt), load), policy=policy))
        for output in (tuple(range(120)), prompt * 6)
    )
    assert repeating.num_steps < 0.7 * distinct.num_steps
    assert repeating.tokens_per_s > 1.2 * distinct.tokens_per_s


def test_a_recording_knows_of_every_token_whether_it_was_foreseen() -> None:
    with pytest.raises(ValueError, match="2 output tokens were recorded, and 1 guesses"):
        RecordedText((1,), (2, 3), (True,))


def test_measured_costs_are_lines_between_points() -> None:
    costs = Costs(9.0, 9.0, session_s=0.001, points=((1, 0.010), (5, 0.014), (9, 0.030)))
    assert costs.step_s(1, 1) == pytest.approx(0.011)
    assert costs.step_s(3, 1) == pytest.approx(0.013)
    assert costs.step_s(11, 2) == pytest.approx(0.030 + 2 * 0.004 + 0.002)


def test_open_load_queues_where_closed_load_does_not() -> None:
    busy = replace(STREAM, max_sessions=1, load=Load(num_sessions=20, num_output_tokens=32, arrivals_per_s=50.0))
    idle = replace(busy, load=replace(busy.load, arrivals_per_s=0.0))
    assert simulate(busy).first_token_at(50) > 5 * simulate(idle).first_token_at(50)


def test_more_workers_serve_more() -> None:
    load = Load(num_sessions=32, concurrency=8, num_output_tokens=64)
    costly = replace(STREAM, target=Costs(0.01, 0.005), load=load)
    one, two = (simulate(replace(costly, num_targets=n, num_drafters=n)).tokens_per_s for n in (1, 2))
    assert two > 1.4 * one


def test_reports_of_several_deployments_add_up() -> None:
    one, other = simulate(STREAM), simulate(replace(STREAM, seed=1))
    both: Report = merged([one, other])
    assert both.tokens_per_s == one.tokens_per_s + other.tokens_per_s
    assert both.num_sessions == 16
    assert both.elapsed_s == max(one.elapsed_s, other.elapsed_s)
    assert len(both.first_token_s) == 16


@pytest.mark.parametrize(
    "scenario",
    [
        replace(STREAM, load=Load(num_sessions=0)),
        replace(STREAM, load=Load(num_output_tokens=0)),
        replace(STREAM, num_targets=0),
        replace(STREAM, target=Costs(0.0)),
    ],
)
def test_nonsense_is_refused(scenario: Scenario) -> None:
    with pytest.raises(ValueError, match=r"target|session"):
        simulate(scenario)


def test_frames_never_overtake() -> None:
    clock, arrived = VirtualClock(), list[tuple[float, int]]()
    link: Link[int] = Link(clock, 0.01, 3.0, lambda frame: arrived.append((clock.now_s, frame)), seed=4)
    for frame in range(50):
        clock.at(0.001 * frame, lambda frame=frame: link.send(frame))  # type: ignore[misc]
    clock.run()
    assert [frame for _, frame in arrived] == list(range(50))
    assert all(0.01 <= time_s - 0.001 * frame <= 0.09 for time_s, frame in arrived)
    assert all(a <= b for (a, _), (b, _) in itertools.pairwise(arrived))
