"""Bans, bias and penalties against transformers' processors and a count of our own, ahead of the commit too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from inference import SamplingRow, SequenceRows, draw
from inference.adjustment import adjusted
from tests.doubles import reference

VOCAB_SIZE = 40


@dataclass(frozen=True)
class Parameters(reference.Parameters):
    """As a worker gets them."""

    min_length: int = 0


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def scores_of(parameters: Parameters, prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
    row = SequenceRows(parameters, len(prompt), [0], VOCAB_SIZE).row([*prompt, *output], [])
    return adjusted(logits, [row.adjustment])[0]


tokens = st.integers(0, VOCAB_SIZE - 1)
parameters_of_all_kinds = st.builds(
    Parameters,
    temperature=st.sampled_from([0.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -2.0]),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100), max_size=3).map(lambda bias: tuple(bias.items())),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    min_tokens=st.integers(0, 8),
)


@given(parameters_of_all_kinds, st.lists(tokens, min_size=1), st.lists(tokens), st.lists(tokens, max_size=6))
@settings(deadline=None)
def test_rows_ahead_are_the_rows_of_plain_decoding(
    parameters: Parameters, prompt: list[int], output: list[int], drafted: list[int]
) -> None:
    min_length = len(prompt) + parameters.min_tokens
    parameters = Parameters(**{**vars(parameters), "min_length": min_length})
    rows = SequenceRows(parameters, len(prompt), [0, 3], VOCAB_SIZE)
    rows.rows([*prompt, *output[: len(output) // 2]], drafted)  # counts in two goes
    got = rows.rows([*prompt, *output], drafted)
    logits = random_logits(len(got))
    scores = adjusted(logits, [row.adjustment for row in got])
    for index, row in enumerate(scores):
        said = [*output, *drafted[:index]]
        expected = reference.adjust(logits[index].numpy(), parameters, prompt, said, [0, 3])
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_repetition_and_bias_as_transformers() -> None:
    prompt, output, logits = [1, 2, 3], [3, 4, 4], random_logits(1)
    ids = torch.tensor([[*prompt, *output]])
    expected = SequenceBiasLogitsProcessor({(7,): 4.0, (2,): -3.0})(ids, logits.clone())
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, expected)
    parameters = Parameters(repetition_penalty=1.7, logit_bias=((7, 4.0), (2, -3.0)))
    assert torch.equal(scores_of(parameters, prompt, output, logits), expected[0])


def test_presence_and_frequency_look_at_the_output_alone() -> None:
    logits = random_logits(1)
    changed = scores_of(Parameters(presence_penalty=1.0, frequency_penalty=0.5), [1, 2], [2, 5, 5], logits) - logits[0]
    assert {index: pytest.approx(change) for index, change in enumerate(changed.tolist()) if change} == {2: -1.5, 5: -2}


def test_a_bad_word_is_looked_for_in_the_output_alone() -> None:
    parameters = Parameters(bad_words=((1, 2), (9,)))
    banned = [
        scores_of(parameters, *sequence, random_logits(1)).isneginf().nonzero().flatten().tolist()
        for sequence in (([5, 1], []), ([5], [1]), ([5], [1, 3]))
    ]
    assert banned == [[9], [2, 9], [9]]


def test_min_p_as_transformers() -> None:
    logits = random_logits(50)
    for min_p in (0.02, 0.3, 1.0):
        expected = MinPLogitsWarper(min_p)(None, logits / 0.8).isfinite()
        drawn = [
            draw(logits, [SamplingRow(0.8, min_p=min_p, seed=seed)] * 50, range(50)).token_ids for seed in range(60)
        ]
        for row in range(50):
            assert all(expected[row, draws[row]] for draws in drawn)
    assert len({draws[0] for draws in drawn}) == 1  # at 1 only the most likely is left


def test_what_does_not_ask_pays_nothing() -> None:
    rows = SequenceRows(Parameters(temperature=1.0), 2, [0], VOCAB_SIZE)
    first, second = rows.rows([1, 2], [3])
    assert first is second is rows.row([1, 2, 3], [])
    assert first.adjustment is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_adjusted_row_does_not_touch_its_batch(temperature: float) -> None:
    logits = random_logits(4)
    plain = SamplingRow(temperature, seed=1)
    strange = SequenceRows(Parameters(temperature, logit_bias=((5, 100.0),)), 1, [], VOCAB_SIZE).row([1], [])
    alone = draw(logits, [plain] * 4, range(4)).token_ids
    got = draw(logits, [plain, strange, plain, plain], range(4)).token_ids
    assert got == [alone[0], 5, *alone[2:]]


def test_everything_banned_is_no_crash() -> None:
    parameters = Parameters(1.0, top_k=3, top_p=0.5, min_p=0.1, bad_words=tuple((id_,) for id_ in range(VOCAB_SIZE)))
    row = SequenceRows(parameters, 1, [], VOCAB_SIZE).row([1], [])
    assert 0 <= draw(random_logits(1), [row], [1], num_runners_up=2).token_ids[0] < VOCAB_SIZE


def test_tokens_that_the_model_does_not_have_are_left_out() -> None:
    parameters = Parameters(logit_bias=((VOCAB_SIZE, 5.0),), bad_words=((1, VOCAB_SIZE),), min_length=9)
    row = SequenceRows(parameters, 1, [VOCAB_SIZE + 3], VOCAB_SIZE).row([1], [])
    assert row.adjustment is None
