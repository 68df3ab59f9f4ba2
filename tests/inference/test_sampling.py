"""Draws against transformers' own warpers plus a Gumbel argmax of our own, and against the distribution they claim."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from inference import SamplingRow, draw, gumbel
from inference.warping import candidates

VOCAB_SIZE = 300


def warp(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """What `transformers.generate` makes of one row of logits, [1, V]."""
    scores = TemperatureLogitsWarper(row.temperature)(None, logits) if row.temperature != 1 else logits
    if row.top_k > 0:
        scores = TopKLogitsWarper(row.top_k)(None, scores)
    return TopPLogitsWarper(row.top_p)(None, scores) if row.top_p < 1 else scores


def draw_naively(logits: torch.Tensor, row: SamplingRow, position: int) -> list[tuple[int, float]]:
    """The drawn token and those next to it, with their distances from its score, for one row of logits, [1, V]."""
    scores = logits.double()
    if row.temperature > 0:
        scores = warp(logits, row).double() + gumbel([row.seed], [position], torch.arange(logits.shape[1]))
    best, token_ids = scores[0].sort(descending=True, stable=True)
    gaps = (best[0] - best).tolist()
    return [(token_id, gap) for token_id, gap in zip(token_ids.tolist(), gaps, strict=True) if gap < float("inf")]


def random_logits(num_rows: int, vocab_size: int = VOCAB_SIZE, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


SETTINGS = [
    SamplingRow(temperature=0),
    SamplingRow(),
    SamplingRow(temperature=0.6),
    SamplingRow(temperature=1.7),
    SamplingRow(top_k=1),
    SamplingRow(top_k=20),
    SamplingRow(top_k=VOCAB_SIZE),
    SamplingRow(top_k=VOCAB_SIZE + 5),
    SamplingRow(top_k=-1),
    SamplingRow(top_p=0.9),
    SamplingRow(top_p=1e-6),
    SamplingRow(temperature=2.5, top_p=0.99),
    SamplingRow(temperature=0.8, top_k=40, top_p=0.95),
    SamplingRow(temperature=1.3, top_k=5, top_p=0.3),
]


@pytest.mark.parametrize("row", SETTINGS, ids=str)
def test_as_transformers_and_a_naive_argmax(row: SamplingRow) -> None:
    logits = random_logits(60)
    rows = [replace(row, seed=index % 3) for index in range(60)]
    positions = [1000 + index for index in range(60)]
    got = draw(logits, rows, positions, num_runners_up=2)
    expected = [draw_naively(logits[i : i + 1], rows[i], positions[i]) for i in range(60)]
    assert got.token_ids == [ranked[0][0] for ranked in expected]
    for runners_up, ranked in zip(got.runners_up, expected, strict=True):
        assert [one.token_id for one in runners_up] == [token_id for token_id, _ in ranked[1:3]]
        assert [one.gap for one in runners_up] == pytest.approx([gap for _, gap in ranked[1:3]], rel=1e-4, abs=1e-5)
    assert draw(logits, rows, positions).token_ids == got.token_ids


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_top_p_over_a_large_vocabulary(scale: float) -> None:
    """A peaked row needs a look at the most likely tokens only, a flat one the whole vocabulary."""
    logits = random_logits(6, vocab_size=5000, scale=scale)
    row = SamplingRow(top_p=0.95)
    looked_at = candidates(logits, row.top_k, row.top_p).scores.shape[1]
    assert looked_at == (5000 if scale < 1 else 1024)
    got = draw(logits, [row] * 6, range(6)).token_ids
    assert got == [draw_naively(logits[i : i + 1], row, i)[0][0] for i in range(6)]


@pytest.mark.parametrize("row", [SamplingRow(top_k=3), SamplingRow(top_p=0.55), SamplingRow(top_k=4, top_p=0.6)])
def test_equal_scores_are_kept_together(row: SamplingRow) -> None:
    """Scores as of a bfloat16 model: three tokens share the boundary's score, so all of them can be drawn."""
    logits = torch.full((1, 5000), -50.0)
    logits[0, [10, 2000]] = 1.0
    logits[0, [20, 3000, 4999]] = 0.5
    drawn = {draw(logits, [row], [position]).token_ids[0] for position in range(300)}
    assert drawn == {10, 2000, 20, 3000, 4999}


ROWS = st.builds(
    SamplingRow,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 7, 50]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@given(st.lists(st.tuples(ROWS, st.integers(0, 5000)), min_size=1, max_size=8), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_its_batch(batch: list[tuple[SamplingRow, int]], logits_seed: int) -> None:
    rows, positions = [row for row, _ in batch], [position for _, position in batch]
    logits = random_logits(len(batch), seed=logits_seed).to(torch.bfloat16).float()
    together = draw(logits, rows, positions, num_runners_up=2)
    for index, (row, position) in enumerate(batch):
        alone = draw(logits[index : index + 1], [row], [position], num_runners_up=2)
        assert alone.token_ids == [together.token_ids[index]]
        gaps = [[one.gap for one in draws.runners_up[at]] for draws, at in ((alone, 0), (together, index))]
        assert gaps[0] == pytest.approx(gaps[1], rel=1e-5)


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize("row", [SamplingRow(), SamplingRow(temperature=0.7, top_k=12, top_p=0.9)], ids=str)
def test_draws_follow_the_distribution(row: SamplingRow, vary: str) -> None:
    num_draws = 20_000
    logits = random_logits(1, vocab_size=24, scale=1.5)
    numbers = list(range(num_draws))
    rows = [replace(row, seed=n) for n in numbers] if vary == "seed" else [row] * num_draws
    positions = [5] * num_draws if vary == "seed" else numbers
    drawn = draw(logits.expand(num_draws, -1), rows, positions).token_ids
    expected = warp(logits, row).softmax(-1)[0].double().numpy() * num_draws
    counts = np.bincount(drawn, minlength=24)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 3.1 * np.sqrt(2 * degrees) + 4  # p of about 0.001


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(2, 1000)
    logits[:, [7, 600, 900]] = 1.0
    for num_runners_up in (0, 2):
        got = draw(logits, [SamplingRow(temperature=0)] * 2, [0, 1], num_runners_up=num_runners_up)
        assert got.token_ids == [7, 7]
    assert all({one.token_id for one in row} <= {600, 900} for row in got.runners_up)


@pytest.mark.parametrize(
    "row", [SamplingRow(temperature=0), SamplingRow(), SamplingRow(top_k=3), SamplingRow(top_p=0.5)]
)
def test_nothing_at_or_beyond_the_limit_is_drawn(row: SamplingRow) -> None:
    logits = random_logits(50)
    logits[:, 200:] += 100.0
    drawn = draw(logits, [row] * 50, range(50), limit=200).token_ids
    assert max(drawn) < 200
    assert drawn == draw(logits[:, :200].clone(), [row] * 50, range(50)).token_ids


def test_masked_tokens_are_never_drawn() -> None:
    logits = random_logits(50)
    logits[:, ::2] = float("-inf")
    for row in (SamplingRow(), SamplingRow(top_k=290), SamplingRow(top_p=0.999999)):
        assert all(token_id % 2 for token_id in draw(logits, [row] * 50, range(50)).token_ids)


@pytest.mark.parametrize("row", SETTINGS, ids=str)
def test_a_row_of_nan_harms_nobody(row: SamplingRow) -> None:
    logits = random_logits(3)
    expected = draw(logits, [row] * 3, range(3)).token_ids
    logits[1] = float("nan")
    got = draw(logits, [row] * 3, range(3)).token_ids
    assert [got[0], got[2]] == [expected[0], expected[2]]
    assert 0 <= got[1] < VOCAB_SIZE


def test_many_rows_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = random_logits(10), [SamplingRow(seed=index) for index in range(10)]
    at_once = draw(logits, rows, range(10), num_runners_up=2)
    monkeypatch.setattr("inference.sampling._MAX_NOISE_ELEMENTS", 3 * VOCAB_SIZE)
    assert draw(logits, rows, range(10), num_runners_up=2) == at_once


def test_logits_are_not_changed() -> None:
    logits = random_logits(len(SETTINGS))
    before = logits.clone()
    draw(logits, SETTINGS, range(len(SETTINGS)), num_runners_up=2)
    assert torch.equal(logits, before)


def test_no_rows() -> None:
    assert draw(torch.empty(0, 10), [], []).token_ids == []


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 rows of logits, 1 settings and 2 positions"):
        draw(torch.zeros(2, 10), [SamplingRow()], [0, 1])


@pytest.mark.parametrize(
    "impossible", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_settings_are_refused(impossible: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SamplingRow(**impossible)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("row", SETTINGS, ids=str)
def test_the_same_draws_on_a_gpu(row: SamplingRow) -> None:
    logits = random_logits(200, vocab_size=5000)
    rows = [replace(row, seed=index) for index in range(200)]
    on_cpu = draw(logits, rows, range(200), num_runners_up=2)
    on_gpu = draw(logits.cuda(), rows, range(200), num_runners_up=2)
    assert on_gpu.token_ids == on_cpu.token_ids
    assert [[one.token_id for one in found] for found in on_gpu.runners_up] == [
        [one.token_id for one in found] for found in on_cpu.runners_up
    ]
