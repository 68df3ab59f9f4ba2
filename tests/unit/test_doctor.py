"""``outrider doctor``: what is decided without running a model."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models

from coordinator.vocabulary import load_served_model
from inference import ModelDescription
from outrider import cli
from outrider.doctor.compatibility import Described, Level, compatibility, has_problem
from outrider.doctor.divergence import Divergence, TokenScore, Verified, bound_of, unexplained
from outrider.doctor.examination import Examination, Measured
from outrider.doctor.memory import ModelMemory, memory_finding, shown
from outrider.doctor.prediction import StepTimes, acceptance_profile, predict
from outrider.doctor.rounding import Rounding
from outrider.doctor.settings import DoctorSettings
from speculation.messages import ModelInfo

GIB = 2**30


def described(
    words: str = "a b c",
    special: str = "",
    end: tuple[int, ...] = (0,),
    context: int = 100,
    template: str | None = None,
) -> Described:
    tokenizer = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words.split())}, unk_token="a"))
    if special:
        tokenizer.add_special_tokens([AddedToken(special, special=True)])
    info = ModelInfo("m", 10, context, end, 1, "float32", "cpu", tokenizer.to_str().encode(), 3)
    return Described(load_served_model(info, tokenizer.to_str().encode()), template)


def levels(target: Described, draft: Described) -> dict[str, Level]:
    return {finding.check: finding.level for finding in compatibility(target, draft)}


def test_a_model_goes_with_itself() -> None:
    assert set(levels(described(), described()).values()) == {Level.GOOD}


def test_exchanged_tokens_are_a_problem_that_names_them() -> None:
    findings = compatibility(described("a b c"), described("a c b"))
    assert has_problem(findings)
    assert "'b' / 'c'" in findings[0].message
    assert "trained with the target's tokenizer" in findings[0].message


@pytest.mark.parametrize(
    ("draft", "check", "named"),
    [
        (described("a b c d"), "vocabulary size", "1 of its own"),
        (described("a b"), "vocabulary size", "lacks 1"),
        (described(special="<x>"), "special tokens", "<x>"),
        (described(end=(1, 2)), "end of text", "1, 2"),
        (described(context=50), "context", "beyond 50"),
        (described(template="{{ x }}"), "chat template", "only the draft"),
    ],
)
def test_smaller_differences_are_warnings(draft: Described, check: str, named: str) -> None:
    findings = compatibility(described(), draft)
    assert not has_problem(findings)
    [found] = [one for one in findings if one.check == check]
    assert found.level is Level.WARNING
    assert named in found.message


def memory_of(free: int | None, device: str = "cuda:0", weights: int = GIB) -> ModelMemory:
    return ModelMemory("target", device, weights, kv_bytes_per_token=1024, kv_tokens=1024, free_bytes=free)


@pytest.mark.parametrize(
    ("models", "level"),
    [
        ([memory_of(3 * GIB), memory_of(3 * GIB)], Level.GOOD),
        ([memory_of(2 * GIB), memory_of(2 * GIB)], Level.WARNING),
        ([memory_of(2 * GIB, "cuda:0"), memory_of(2 * GIB, "cuda:1")], Level.GOOD),
        ([memory_of(GIB), memory_of(3 * GIB)], Level.PROBLEM),
        ([memory_of(None), memory_of(None)], Level.WARNING),
    ],
)
def test_memory_alone_and_together(models: list[ModelMemory], level: Level) -> None:
    assert memory_finding(models).level is level


def test_bytes_are_shown_in_binary_units() -> None:
    assert [shown(n) for n in (5, 1536, 200 * 2**20, 3 * GIB)] == ["5 B", "1.5 KiB", "200 MiB", "3.0 GiB"]


def test_the_bound_is_the_stated_formula() -> None:
    # N = 2 * 13 + 1 = 27: 6 * 2^-8 * 3 * 2 of hidden states, and 2 ulp: bfloat16 has steps of 1/16 in [8, 16).
    assert Rounding("bfloat16", 13, 64).bound(spread=2.0, magnitude=9.0) == 6 * 2**-8 * 3 * 2 + 2 / 16
    assert Rounding("float32", 13, 64).num_roundings == 27 * 64


def test_a_finer_dtype_explains_less() -> None:
    bounds = [Rounding(dtype, 22, 192).bound(4.0, 10.0) for dtype in ("bfloat16", "float16", "float32")]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[2] < 1e-3


def divergence(margin: float, bound: float) -> Divergence:
    plain, verified = TokenScore(1, 5.0 + margin, 0.0), TokenScore(2, 4.0, 1.0)
    return Divergence("K = 1, alone", 0, 3, 0.8, plain, verified, 2.0, 0.1, bound)


def test_the_margin_counts_the_noise_of_both_draws() -> None:
    assert divergence(0.25, 1.0).margin == pytest.approx(0.25)


def test_only_what_is_beyond_the_bound_is_unexplained() -> None:
    small, large = divergence(0.1, 0.2), divergence(0.3, 0.2)
    result = Verified("K = 1, alone", 0.8, 10, 5, 0.1, (small, large))
    assert unexplained([result]) == [large]


def test_the_bound_looks_at_the_larger_logit() -> None:
    rounding = Rounding("bfloat16", 4, 64)
    assert bound_of(rounding, 1.0, 1.0, -40.0) == rounding.bound(1.0, 40.0)


def test_the_profile_is_that_of_verify_steps() -> None:
    profile = acceptance_profile([[True, True, False, True] * 200], k=2)
    # Steps begin after each miss or full acceptance: TT|F, T|TF ... so both depths are right most of the time.
    assert profile.weight > 200
    assert profile.survival(2)[0] < 1.0


def test_a_perfect_draft_commits_k_plus_one_tokens_a_step() -> None:
    times = StepTimes(dict.fromkeys(range(1, 6), 0.01), draft_s=0.0001)
    predictions = predict(0.0, [[True] * 120], times, 4, 0.0)
    for one in predictions.by_k:
        assert one.tokens_per_step == pytest.approx(one.k + 1, rel=0.02)
        assert one.ideal == pytest.approx(one.k + 1, rel=0.02)
        assert one.turns < one.ideal
        assert one.stream <= one.k + 1 + 1e-6
    assert predictions.best.k == 4
    assert predictions.acceptance == 1.0


def test_a_draft_that_is_always_wrong_does_not_pay() -> None:
    times = StepTimes({n: 0.010 + 0.002 * n for n in range(1, 6)}, draft_s=0.005)
    predictions = predict(0.0, [[False] * 60], times, 4, 0.0)
    assert all(one.ideal < 1.0 and one.turns < 1.0 for one in predictions.by_k)
    assert predictions.acceptance == 0.0
    assert predictions.adaptive > 0.9


def test_distance_costs_the_stream() -> None:
    times = StepTimes(dict.fromkeys(range(1, 4), 0.01), draft_s=0.001)
    trace = [index % 3 > 0 for index in range(45)]
    near, far = (predict(0.0, [trace], times, 2, latency_s) for latency_s in (0.0, 0.050))
    assert far.best.stream < near.best.stream


@pytest.mark.parametrize(("margin", "exit_code"), [(0.1, 0), (0.3, 1)])
def test_only_what_rounding_does_not_explain_fails(
    margin: float, exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verified = Verified("K = 1, alone", 0.8, 10, 5, 0.1, (divergence(margin, 0.2),))
    times = StepTimes({1: 0.01, 2: 0.011}, 0.001)
    predictions = predict(0.8, [[True, False] * 10], times, 1, 0.0)
    facts = ModelDescription("m", "Llama", 3, 100, (0,), 1, "bfloat16", "cpu", GIB, 2, 16)
    examination = Examination(
        models=(facts, facts),
        memory=(memory_of(None), memory_of(None)),
        findings=tuple(compatibility(described(), described())),
        measured=Measured(times, (predictions,), (verified,), Rounding("bfloat16", 2, 16)),
        token_text=lambda token_id: f"[{token_id}]",
    )
    monkeypatch.setattr("outrider.doctor.examination.examine", lambda *_: examination)

    assert cli.run(["doctor"]) == exit_code

    output = capsys.readouterr()
    assert max(map(len, output.out.splitlines())) <= 100
    assert "'[1]'" in output.out
    assert ("NOT ROUNDING" in output.out) == bool(exit_code)
    assert ("more than rounding explains" in output.err) == bool(exit_code)

    assert cli.run(["doctor", "--json"]) == exit_code
    [found] = json.loads(capsys.readouterr().out)["verified"][0]["divergences"]
    assert found["explained"] == (not exit_code)
    assert found["plain"]["token"] == "[1]"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperatures", "-1"], "--temperatures"),
        (["--temperatures", "hot"], "--temperatures"),
        (["--temperatures", ","], "--temperatures"),
        (["--temperatures", "nan"], "--temperatures"),
        (["--max-k", "0"], "--max-k"),
        (["--prompts", "0"], "--prompts"),
        (["--latency-ms", "-1"], "--latency-ms"),
        (["--target", "m"], "--draft"),
        (["--draft", "m"], "--target"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", *arguments]) == 2
    shown_ = capsys.readouterr().err
    assert named in shown_
    assert shown_.count("\n") == 1


def test_the_temperatures_are_distinct() -> None:
    assert DoctorSettings(temperatures="0, 0.8,0").temperature_list == (0.0, 0.8)
