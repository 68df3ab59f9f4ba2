"""A cell: one system under one condition, summed up over its rounds. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Final

from outrider.bench.best_k import BestK, best_k
from outrider.bench.coordinator_work import CoordinatorWork
from outrider.bench.estimates import Estimate, median_of
from outrider.bench.ideal import BareSteps, Ideal
from outrider.bench.measure import Block, Condition, Round
from outrider.bench.systems import OUTRIDER, PLAIN, Run
from outrider.client import SpeculationStats

_COUNTS: Final = (
    *("num_steps", "num_free_run_steps", "num_proposed", "num_dropped", "num_drafted", "num_accepted"),
    *("num_looked_up", "num_looked_up_accepted"),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """Rates and times are medians over the rounds; ratios are medians over pairs of rounds, the system's and plain's of
    the same batch, one right after the other on the same deployment. Spreads are quartiles."""

    system: str
    condition: Condition
    num_runs: int
    """Completions measured."""
    tokens_per_s: Estimate
    """From the request to the last token, of all requests together."""
    decode_tokens_per_s: Estimate | None
    """After the first token."""
    ttft_ms: Estimate
    ratio_to_plain: Estimate
    decode_ratio_to_plain: Estimate | None
    ttft_ratio_to_plain: Estimate
    plain_tokens_per_s: float
    """Of plain decoding beside it."""
    acceptance_rate: Estimate | None
    """Over all runs, with quartiles of the runs; None if nothing was drafted."""
    mean_acceptance_length: float | None
    """None for a system that does not speculate here."""
    mean_k: float | None
    speculation_counts: Mapping[str, int] | None
    """What became of drafted tokens, over all runs; named as in `SpeculationStats`."""
    tokens_equal: bool | None
    """To plain decoding through the same server; None where they need not be."""
    ratios: Mapping[str, Estimate]
    """tokens_per_s over every other system's of the same block, as `ratio_to_plain`; only for outrider."""
    best_k: BestK | None
    """Only for outrider, beside fixed Ks."""
    drafted_per_committed: float | None
    """Tokens that drafters sent for each committed one."""
    caught_share: float | None
    """Misses after which a branch was there already, over all misses; None if there were none."""
    coordinator_us_per_token: Estimate | None
    """Processor time of the coordinator, over the rounds."""
    frames_per_step: tuple[float, float] | None
    """To and from the target for each of its steps, over all rounds."""
    ideal: Ideal | None
    """Only for outrider, one request at a time on the pair."""
    bare: BareSteps | None
    """Medians of what was timed beside the rounds."""
    ratio_to_ideal: Estimate | None
    """Of decoding after the first token, as the ideal knows no prefill, with the bare steps beside each round."""


def cells_of(block: Block) -> list[Cell]:
    """One cell for each system of the block."""
    return [_cell(system, block) for system in block.rounds]


def _cell(system: str, block: Block) -> Cell:
    rounds, plain = block.rounds[system], block.rounds[PLAIN]
    runs = [run for round_ in rounds for run in round_.runs]
    stats = [run.speculation for run in runs if run.speculation is not None]
    steps = sum(one.num_steps for one in stats)
    ideal = block.ideal if system == OUTRIDER else None
    bare = [round_.bare for round_ in rounds if round_.bare is not None]
    ttft = _pairs(rounds, plain, _first_token_s)
    assert ttft is not None
    ratio = _pairs(rounds, plain, lambda round_: round_.tokens_per_s)
    assert ratio is not None
    return Cell(
        system=system,
        condition=block.condition,
        num_runs=len(runs),
        tokens_per_s=median_of(round_.tokens_per_s for round_ in rounds),
        decode_tokens_per_s=_median(rounds, lambda round_: round_.decode_tokens_per_s),
        ttft_ms=median_of(1000 * run.first_token_s for run in runs),
        ratio_to_plain=ratio,
        decode_ratio_to_plain=_pairs(rounds, plain, lambda round_: round_.decode_tokens_per_s),
        ttft_ratio_to_plain=ttft,
        plain_tokens_per_s=median_of(round_.tokens_per_s for round_ in plain).value,
        acceptance_rate=acceptance_rate(stats),
        mean_acceptance_length=sum(len(run.token_ids) for run in runs) / steps if steps else None,
        mean_k=sum(one.mean_k for one in stats) / len(stats) if stats else None,
        speculation_counts={name: sum(getattr(one, name) for one in stats) for name in _COUNTS} if stats else None,
        tokens_equal=_tokens_equal(system, block),
        ratios=_ratios(block) if system == OUTRIDER else {},
        best_k=best_k(block.rounds) if system == OUTRIDER else None,
        drafted_per_committed=_drafted_per_committed(stats, runs),
        caught_share=_caught_share(stats),
        coordinator_us_per_token=_median(rounds, _coordinator_us_per_token),
        frames_per_step=_frames_per_step(rounds),
        ideal=ideal,
        bare=BareSteps.median_of(bare) if bare else None,
        ratio_to_ideal=None if ideal is None else _median(rounds, partial(_of_ideal, ideal)),
    )


def _of_ideal(ideal: Ideal, round_: Round) -> float | None:
    mine, bare = round_.decode_tokens_per_s, round_.bare
    return None if mine is None or bare is None else mine / ideal.tokens_per_s(bare)


def _ratios(block: Block) -> dict[str, Estimate]:
    mine = block.rounds[OUTRIDER]
    ratios = {
        name: _pairs(mine, its, lambda round_: round_.tokens_per_s)
        for name, its in block.rounds.items()
        if name != OUTRIDER
    }
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _drafted_per_committed(stats: Sequence[SpeculationStats], runs: Sequence[Run]) -> float | None:
    return sum(one.num_proposed for one in stats) / sum(len(run.token_ids) for run in runs) if stats else None


def _caught_share(stats: Sequence[SpeculationStats]) -> float | None:
    num_misses = sum(one.num_misses for one in stats)
    return sum(one.num_caught for one in stats) / num_misses if num_misses else None


def _coordinator_us_per_token(round_: Round) -> float | None:
    return 1e6 * round_.coordinator_work.cpu_s / round_.num_tokens if round_.coordinator_work is not None else None


def _frames_per_step(rounds: Sequence[Round]) -> tuple[float, float] | None:
    works = [round_.coordinator_work for round_ in rounds if round_.coordinator_work is not None]
    return reduce(CoordinatorWork.plus, works).frames_per_step if works else None


def acceptance_rate(stats: Sequence[SpeculationStats]) -> Estimate | None:
    """Accepted drafted tokens / drafted tokens verified, over all runs together; quartiles of the single runs."""
    drafting = [one for one in stats if one.num_drafted]
    if not drafting:
        return None
    total = sum(one.num_accepted for one in drafting) / sum(one.num_drafted for one in drafting)
    spread = median_of(one.num_accepted / one.num_drafted for one in drafting)
    return Estimate(total, spread.lower, spread.upper)


def _pairs(
    rounds: Sequence[Round], plain: Sequence[Round], measure: Callable[[Round], float | None]
) -> Estimate | None:
    """Median of the system's value over plain's in the same round."""
    both = [(measure(mine), measure(its)) for mine, its in zip(rounds, plain, strict=True)]
    ratios = [mine / its for mine, its in both if mine is not None and its is not None]
    return median_of(ratios) if ratios else None


def _median(rounds: Sequence[Round], measure: Callable[[Round], float | None]) -> Estimate | None:
    values = [value for value in map(measure, rounds) if value is not None]
    return median_of(values) if values else None


def _first_token_s(round_: Round) -> float:
    return median_of(run.first_token_s for run in round_.runs).value


def _tokens_equal(system: str, block: Block) -> bool | None:
    """Plain decoding is what the others are compared with."""
    if system != PLAIN and system not in block.compared:
        return None
    return not any(difference.system == system for difference in block.differences)
