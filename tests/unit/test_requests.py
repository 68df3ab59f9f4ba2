"""Defaults are filled in, limits are the model's, and everything wrong is named at once."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.requests import GenerateRequest, Job, SpeculationDefaults, SpeculationOptions, Stopping, validate
from coordinator.vocabulary import load_served_model
from rpc import target_codec
from rpc.errors import InvalidRequest, ModelNotFound
from speculation.messages import Grammar, LogprobOptions, Method, OpenTarget, Sampling, SessionId
from tests.doubles.scripted_workers import toy_model_info, toy_tokenizer_json

TOKENIZER = toy_tokenizer_json()
MODEL = load_served_model(toy_model_info("toy", TOKENIZER, max_context=100), TOKENIZER)
DEFAULTS = SpeculationDefaults(policy="goodput", max_k=8, max_lookahead=20)


def job_of(request: GenerateRequest) -> Job:
    return validate(request, MODEL, DEFAULTS)


def violations_of(request: GenerateRequest) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        job_of(request)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_defaults() -> None:
    job = job_of(GenerateRequest(prompt="abc", seed=5))

    assert dataclasses.replace(job, request_id="") == Job(
        request_id="",
        prompt_token_ids=(1, 2, 3),
        sampling=Sampling(0.0, 0, 1.0, 5, prompt_length=3),
        max_length=100,
        stop_token_ids=(0,),
        policy="goodput",
        k=8,
        max_lookahead=20,
    )
    assert job.request_id


def test_everything_said() -> None:
    options = SpeculationOptions(policy="fixed", k=2, lookahead=7)
    job = job_of(
        GenerateRequest(
            prompt=[4, 5],
            model="toy",
            max_tokens=10,
            temperature=0.8,
            top_k=3,
            top_p=0.9,
            seed=2**64 - 1,
            stop_token_ids=[9, 7, 9],
            ignore_eos=True,
            speculation=options,
            request_id="mine",
        )
    )

    sampling = Sampling(0.8, 3, 0.9, 2**64 - 1, prompt_length=2)
    assert job == Job("mine", (4, 5), sampling, 12, (7, 9), "fixed", 2, 7, stop=Stopping(token_ids=(7, 9)))


def test_everything_said_of_logits_and_answers() -> None:
    job = job_of(
        GenerateRequest(
            prompt="ab",
            seed=1,
            min_p=0.1,
            repetition_penalty=1.2,
            presence_penalty=-0.5,
            frequency_penalty=2.0,
            logit_bias=[(3, -100.0), (4, 1.5)],
            bad_words=["ab", "c"],
            min_tokens=5,
            n=3,
            logprobs=0,
            prompt_logprobs=20,
            logprobs_mode="processed",
            stop=["ba", "c"],
            include_stop_str_in_output=True,
        )
    )
    bias, bad_words = ((3, -100.0), (4, 1.5)), ((1, 2), (3,))
    assert job.sampling == Sampling(0.0, 0, 1.0, 1, 0.1, 1.2, -0.5, 2.0, bias, bad_words, min_length=7, prompt_length=2)
    assert (job.n, job.logprobs, job.prompt_logprobs) == (3, LogprobOptions(0, processed=True), 20)
    assert job.stop == Stopping(("ba", "c"), (), keeps_stop=True, min_tokens=5)


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_a_method_comes_with_a_length_of_q(method: str) -> None:
    def sampling(options: SpeculationOptions) -> Sampling:
        return job_of(GenerateRequest(prompt="abc", temperature=1.0, seed=5, speculation=options)).sampling

    expected = Sampling(1.0, 0, 1.0, 5, prompt_length=3, method=Method(method), draft_top_n=64)
    assert sampling(SpeculationOptions(method=method)) == expected
    assert sampling(SpeculationOptions(method=method, draft_top_n=3)).draft_top_n == 3
    assert sampling(SpeculationOptions(method="coupled", draft_top_n=3)) == Sampling(1.0, 0, 1.0, 5, prompt_length=3)


def test_a_method_that_there_is_not() -> None:
    options = SpeculationOptions(method="typical", draft_top_n=0)
    found = violations_of(GenerateRequest(prompt="a", speculation=options))
    assert "coupled, rejection, block" in found["speculation.method"]
    assert "[1, 256]" in found["speculation.draft_top_n"]
    found = violations_of(GenerateRequest(prompt="a", speculation=SpeculationOptions(draft_top_n=2**40)))
    assert set(found) == {"speculation.draft_top_n"}


def test_without_a_seed_one_is_drawn_each_time() -> None:
    seeds = {job_of(GenerateRequest(prompt="a")).sampling.seed for _ in range(8)}
    assert len(seeds) == 8


def test_stop_tokens_come_besides_the_models_own() -> None:
    assert job_of(GenerateRequest(prompt="a", stop_token_ids=[3])).stop_token_ids == (0, 3)


def test_top_k_beyond_the_vocabulary_is_the_vocabulary() -> None:
    assert job_of(GenerateRequest(prompt="a", top_k=2**62)).sampling.top_k == MODEL.info.vocab_size


@pytest.mark.parametrize(
    "options",
    [SpeculationOptions(disabled=True), SpeculationOptions(k=0), SpeculationOptions(lookahead=0)],
)
def test_ways_to_decode_plainly(options: SpeculationOptions) -> None:
    assert job_of(GenerateRequest(prompt="a", speculation=options)).policy is None


def test_a_k_of_its_own_gets_the_lookahead_it_needs() -> None:
    assert job_of(GenerateRequest(prompt="a", speculation=SpeculationOptions(k=30))).max_lookahead > 60


def test_prompt_and_answer_may_fill_the_context_exactly() -> None:
    assert job_of(GenerateRequest(prompt=[1] * 99)).max_length == 100
    assert job_of(GenerateRequest(prompt=[1] * 40, max_tokens=60)).max_length == 100


@pytest.mark.parametrize(
    ("request_", "field", "parts"),
    [
        (GenerateRequest(prompt=[1] * 100), "prompt", ["100 tokens", "99"]),
        (GenerateRequest(prompt=[1] * 40, max_tokens=61), "max_tokens", ["61", "at most 60", "100"]),
        (GenerateRequest(prompt="a", max_tokens=0), "max_tokens", ["is 0", "at least 1"]),
        (GenerateRequest(prompt="a", temperature=float("nan")), "temperature", ["nan"]),
        (GenerateRequest(prompt=[1, 11, 12, 13, 14]), "prompt", ["11, 12, 13 ...", "[0, 11)"]),
        (GenerateRequest(prompt="a", seed=-1), "seed", ["-1"]),
        (GenerateRequest(prompt="a", seed=2**64), "seed", ["2^64"]),
        (GenerateRequest(prompt="\ud800"), "prompt", ["Unicode"]),
        (GenerateRequest(prompt=""), "prompt", ["empty"]),
        (GenerateRequest(prompt="xyz"), "prompt", ["empty"]),  # nothing of it is in the vocabulary
        (GenerateRequest(prompt="a", speculation=SpeculationOptions(k=65)), "speculation.k", ["65", "[0, 64]"]),
        (GenerateRequest(prompt="a", min_p=1.5), "min_p", ["1.5", "[0, 1]"]),
        (GenerateRequest(prompt="a", repetition_penalty=0.0), "repetition_penalty", ["0.0", "[0.001, 1000]"]),
        (GenerateRequest(prompt="a", presence_penalty=2.1), "presence_penalty", ["2.1", "[-2, 2]"]),
        (GenerateRequest(prompt="a", frequency_penalty=float("nan")), "frequency_penalty", ["nan", "[-2, 2]"]),
        (GenerateRequest(prompt="a", logit_bias=[(1, 101.0)]), "logit_bias", ["token 1", "101", "[-100, 100]"]),
        (GenerateRequest(prompt="a", logit_bias=[(1, 1.0), (1, 2.0)]), "logit_bias", ["twice"]),
        (GenerateRequest(prompt="a", logit_bias=[(11, 1.0)]), "logit_bias", ["11", "[0, 11)"]),
        (GenerateRequest(prompt="a", bad_words=["a"] * 65), "bad_words", ["65", "64"]),
        (GenerateRequest(prompt="a", bad_words=[""]), "bad_words", ["empty"]),
        (GenerateRequest(prompt="a", min_tokens=-1), "min_tokens", ["-1", "at least 0"]),
        (GenerateRequest(prompt="a", min_tokens=5, max_tokens=4), "min_tokens", ["5", "max_tokens", "4"]),
        (GenerateRequest(prompt="a", min_tokens=100), "min_tokens", ["100", "99"]),
        (GenerateRequest(prompt="a", n=65), "n", ["65", "[1, 64]"]),
        (GenerateRequest(prompt="a", n=0), "n", ["0", "[1, 64]"]),
        (GenerateRequest(prompt="a", logprobs=21), "logprobs", ["21", "[0, 20]"]),
        (GenerateRequest(prompt="a", prompt_logprobs=-1), "prompt_logprobs", ["-1", "[0, 20]"]),
        (GenerateRequest(prompt="a", logprobs_mode="x"), "logprobs_mode", ["'x'", "raw, processed"]),
        (GenerateRequest(prompt="a", stop=["x"] * 17), "stop", ["17", "16"]),
        (GenerateRequest(prompt="a", stop=["x" * 257]), "stop", ["257", "256"]),
        (GenerateRequest(prompt="a", stop=["\udc00"]), "stop", ["Unicode"]),
        (GenerateRequest(prompt="a", speculation=SpeculationOptions(policy="x")), "speculation.policy", ["goodput"]),
    ],
)
def test_violations_name_the_value_and_the_limit(request_: GenerateRequest, field: str, parts: list[str]) -> None:
    violations = violations_of(request_)

    assert set(violations) == {field}
    for part in parts:
        assert part in violations[field]


def test_unknown_model() -> None:
    with pytest.raises(ModelNotFound, match="'toy'"):
        job_of(GenerateRequest(prompt="a", model="other"))


numbers = st.integers() | st.none()
floats = st.floats() | st.none()


@given(
    st.builds(
        GenerateRequest,
        prompt=st.lists(st.integers(-2, 13), max_size=120) | st.text(max_size=20),
        max_tokens=numbers,
        temperature=floats,
        top_k=numbers,
        top_p=floats,
        seed=numbers,
        stop_token_ids=st.lists(st.integers(-2, 13), max_size=70),
        min_p=floats,
        repetition_penalty=floats,
        presence_penalty=floats,
        frequency_penalty=floats,
        logit_bias=st.lists(st.tuples(st.integers(-2, 13), st.floats(-101, 101)), max_size=4),
        bad_words=st.lists(st.text("ab x\ud800", max_size=5), max_size=3),
        min_tokens=numbers,
        n=numbers,
        logprobs=numbers,
        stop=st.lists(st.text(max_size=5), max_size=3),
        speculation=st.builds(
            SpeculationOptions, policy=st.sampled_from(["", "fixed", "x"]), k=numbers, lookahead=numbers
        ),
    )
)
def test_whatever_is_accepted_fits_the_model_and_the_wire(request_: GenerateRequest) -> None:
    try:
        job = job_of(request_)
    except InvalidRequest:
        return
    assert 0 < len(job.prompt_token_ids) < job.max_length <= 100
    assert all(0 <= id_ < 11 for id_ in (*job.prompt_token_ids, *job.stop_token_ids))
    assert 0 <= job.sampling.temperature < float("inf")
    assert 0 < job.sampling.top_p <= 1
    assert 0 <= job.sampling.top_k < 2**32
    assert 0 <= job.sampling.seed < 2**64
    assert all(0 <= id_ < 11 for word in job.sampling.bad_words for id_ in word)
    assert job.sampling.min_length <= job.max_length
    target_codec.target_commands_to_proto(
        [(SessionId(1), OpenTarget((1,), job.sampling, 9, (), 0, logprobs=job.logprobs))]
    )
    assert 0 <= job.k <= 64
    assert 0 <= job.max_lookahead <= 256


def test_a_text_that_cannot_fit_is_refused_without_tokenizing_it() -> None:
    assert MODEL.longest_token_chars > 0
    found = violations_of(GenerateRequest(prompt="a" * (100 * MODEL.longest_token_chars + 1)))
    assert "characters" in found["prompt"]


def test_a_message_quotes_no_more_than_a_line_of_what_the_client_said() -> None:
    with pytest.raises(ModelNotFound) as caught:
        job_of(GenerateRequest(prompt="a", model="m" * 10**6))
    assert len(caught.value.message) < 300
    found = violations_of(GenerateRequest(prompt="a", speculation=SpeculationOptions(policy="x" * 10**6)))
    assert len(found["speculation.policy"]) < 300


def test_a_grammar_goes_along_and_contradicts_going_on_for_ever() -> None:
    grammar = Grammar("regex", "a+")
    assert job_of(GenerateRequest(prompt="ab", structured_output=grammar)).sampling.grammar == grammar
    for_ever = GenerateRequest(prompt="ab", structured_output=grammar, ignore_eos=True)
    assert violations_of(for_ever).keys() == {"ignore_eos"}
    empty = GenerateRequest(prompt="ab", structured_output=Grammar("", ""))
    assert violations_of(empty).keys() == {"structured_output"}
