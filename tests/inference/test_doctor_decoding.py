"""The doctor's own decoding: equal where the model is, and every fault of a pass over several tokens is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference import Chunk, PagedRuntime, SamplingRow, load_model
from outrider.doctor.decoding import PlainText, Verification, decode_plainly, guess
from outrider.doctor.rounding import Rounding

from .tiny_models import VOCAB_SIZE

ROUNDING = Rounding("float32", 2, 48)
NUM_TOKENS = 24
PROMPTS = ([5, 7, 11, 13], [17, 19])


class Faulty:
    """A runtime that computes ``amount`` more for one token in every row but the first of a pass."""

    def __init__(self, inner: PagedRuntime, token_id: int, amount: float) -> None:
        self._inner = inner
        self._token_id = token_id
        self._amount = amount

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def forward(self, batch: Sequence[Chunk]) -> torch.Tensor:
        logits = self._inner.forward(batch).clone()
        logits[1:, self._token_id] += self._amount
        return logits


@pytest.fixture(scope="module")
def runtime(llama_folder: Path) -> PagedRuntime:
    return load_model(llama_folder, device="cpu", kv_tokens=1024).runtime


def texts_of(runtime: PagedRuntime, temperature: float) -> list[PlainText]:
    texts = []
    for index, prompt in enumerate(PROMPTS):
        text = decode_plainly(runtime, VOCAB_SIZE, index, prompt, SamplingRow(temperature, seed=index), NUM_TOKENS)
        texts.append(replace(text, guesses=guess(runtime, VOCAB_SIZE, text)))
    return texts


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("k", [0, 1, 3, 40])
def test_a_sound_model_is_equal_and_foresees_itself(runtime: PagedRuntime, temperature: float, k: int) -> None:
    texts = texts_of(runtime, temperature)
    assert all(all(text.trace) and len(text.trace) == NUM_TOKENS for text in texts)

    check = Verification(runtime, VOCAB_SIZE, ROUNDING, "way", k)
    check.run(texts)

    result = check.result(temperature)
    assert not result.divergences
    assert result.num_tokens == len(texts) * (NUM_TOKENS - 1)
    assert result.num_steps == -(-(NUM_TOKENS - 1) // (k + 1))
    assert result.largest_shift < 1e-4
    runtime.check_integrity()
    assert runtime.num_free_tokens == 1024


def test_wrong_guesses_change_nothing(runtime: PagedRuntime) -> None:
    [text, _] = texts_of(runtime, 0.8)
    wrong = [(token_id + (index % 3 == 0)) % VOCAB_SIZE for index, token_id in enumerate(text.token_ids)]
    check = Verification(runtime, VOCAB_SIZE, ROUNDING, "way", 5)

    check.run([replace(text, guesses=wrong)])

    assert not check.result(0.8).divergences


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_fault_beyond_rounding_is_found_wherever_it_is(runtime: PagedRuntime, temperature: float) -> None:
    [text, _] = texts_of(runtime, temperature)
    token_id = next(id_ for id_ in range(VOCAB_SIZE) if id_ not in text.token_ids)
    check = Verification(Faulty(runtime, token_id, 100.0), VOCAB_SIZE, ROUNDING, "way", 1)  # type: ignore[arg-type]

    check.run([text])

    divergences = check.result(temperature).divergences
    # The second row of every step is wrong; what follows is compared with plain decoding again.
    assert [one.position for one in divergences] == list(range(2, NUM_TOKENS, 2))
    assert all(one.verified.token_id == token_id and one.shift == pytest.approx(100, abs=1e-3) for one in divergences)
    assert all(one.margin > 0 and not one.is_explained for one in divergences)


def test_a_near_tie_is_explained(runtime: PagedRuntime) -> None:
    [text, _] = texts_of(runtime, 0.0)
    best, second = text.logits.topk(2).values[2].tolist()
    token_id = int(text.logits[2].topk(2).indices[1])
    faulty = Faulty(runtime, token_id, best - second + 1e-3)
    check = Verification(faulty, VOCAB_SIZE, Rounding("bfloat16", 2000, 48), "way", 1)  # type: ignore[arg-type]

    check.run([text])

    found = next(one for one in check.result(0.0).divergences if one.position == 2)
    assert found.margin == pytest.approx(best - second, abs=1e-4)
    assert found.is_explained


def test_a_draft_without_the_targets_last_tokens_guesses_up_to_the_first(runtime: PagedRuntime) -> None:
    [text, _] = texts_of(runtime, 0.0)
    unknown = [*text.token_ids[:5], VOCAB_SIZE + 3, *text.token_ids[6:]]

    assert guess(runtime, VOCAB_SIZE, replace(text, token_ids=unknown))[:5] == text.token_ids[:5]
    assert len(guess(runtime, VOCAB_SIZE, replace(text, token_ids=unknown))) == 6
