"""The pure parts of ``outrider bench``, and its round-robin with systems that only say how long they took."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from outrider.bench.cells import Cell, cells_of
from outrider.bench.coordinator_work import CoordinatorWork
from outrider.bench.estimates import Estimate, median_of
from outrider.bench.figures import figures_of
from outrider.bench.ideal import BareSteps, Ideal, mean_acceptance_length
from outrider.bench.machine import Memory, cpu_seconds_of, resident_bytes
from outrider.bench.measure import (
    BareClock,
    Block,
    Condition,
    Difference,
    Observer,
    batches,
    first_difference,
    in_turn,
    measure,
    num_rounds,
    repeats_for,
)
from outrider.bench.plot import plot_cells
from outrider.bench.report import best_k_lines, cells_tables, equality_line, figures_table, ideal_lines, report
from outrider.bench.stages import Results
from outrider.bench.systems import (
    NO_DRAFTER,
    OUTRIDER,
    PLAIN,
    TRANSFORMERS_ASSISTED,
    TRANSFORMERS_PLAIN,
    TURNS,
    WRONG_DRAFTER,
    Run,
    System,
    Task,
    fixed_k_name,
)
from outrider.client import SpeculationStats
from outrider.failures import CommandFailed

GREEDY = Condition(concurrency=1, temperature=0)


def stats(num_drafted: int, num_accepted: int, num_steps: int) -> SpeculationStats:
    return SpeculationStats(
        num_steps=num_steps,
        num_free_run_steps=0,
        num_drafted=num_drafted,
        num_accepted=num_accepted,
        num_proposed=num_drafted,
        num_dropped=0,
        acceptance_rate=num_accepted / num_drafted if num_drafted else 0.0,
        mean_acceptance_length=1.0,
        mean_k=4.0,
        last_k=4,
        num_draft_losses=0,
        num_target_losses=0,
        policy="goodput",
    )


@dataclass
class Scripted:
    """Takes so many seconds for each completion in turn, and gives the tokens said."""

    name: str
    seconds: Sequence[float]
    speculation: SpeculationStats | None = None
    lies_about: int | None = None
    """Prompt for which the last token is another."""
    log: list[str] = field(default_factory=list)
    num_runs: int = 0

    def must_equal_plain(self, temperature: float) -> bool:
        return self.name != TRANSFORMERS_PLAIN or temperature == 0

    async def run(self, task: Task) -> Run:
        self.log.append(self.name)
        total_s = self.seconds[self.num_runs % len(self.seconds)]
        self.num_runs += 1
        tokens = list(range(task.max_tokens))
        if task.prompt_index == self.lies_about:
            tokens[-1] += 1
        return Run(tuple(tokens), total_s / 10, 1, total_s, self.speculation)


class Recorder(Observer):
    def __init__(self) -> None:
        self.differences: list[Difference] = []
        self.num_ended = 0

    def ends(self) -> None:
        self.num_ended += 1

    def differs(self, difference: Difference) -> None:
        self.differences.append(difference)


async def run_block(
    systems: Sequence[System],
    condition: Condition = GREEDY,
    num_prompts: int = 3,
    observer: Observer | None = None,
    time_bare: BareClock | None = None,
) -> Block:
    prompts = [f"prompt {index}" for index in range(num_prompts)]
    work = batches(prompts, condition, num_prompts, 10, 1)
    return await measure(systems, condition, work, observer or Observer(), time_bare=time_bare)


def test_a_median_comes_with_quartiles() -> None:
    assert median_of([5, 1, 2, 4, 3]) == Estimate(3, 2, 4)
    assert median_of([7]) == Estimate(7, 7, 7)


def test_an_inverse_keeps_the_quartiles_in_order() -> None:
    assert Estimate(2, 1, 4).inverse() == Estimate(0.5, 0.25, 1)


def test_batches_go_through_all_prompts_in_every_repetition_with_other_seeds() -> None:
    found = batches(["a", "b", "c"], GREEDY, num_prompts=2, max_tokens=5, repeats=2)

    assert [[task.prompt for task in batch] for batch in found] == [["a"], ["b"], ["a"], ["b"]]
    assert len({task.seed for batch in found for task in batch}) == 4


def test_a_batch_is_always_full() -> None:
    found = batches(["a", "b", "c"], Condition(4, 0), num_prompts=2, max_tokens=5, repeats=1)

    assert [[task.prompt for task in batch] for batch in found] == [["a", "b", "c", "a"]]
    assert len({task.seed for task in found[0]}) == 4


def test_the_order_turns_round() -> None:
    assert [in_turn("abc", index) for index in range(3)] == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


@pytest.mark.parametrize(
    ("found", "position"), [([1, 2, 3], None), ([1, 9, 3], 1), ([1, 2], 2), ([1, 2, 3, 4], 3), ([], 0)]
)
def test_first_difference(found: list[int], position: int | None) -> None:
    assert first_difference(found, [1, 2, 3]) == position


async def test_one_system_after_the_other_each_beside_plain() -> None:
    log: list[str] = []
    systems = [Scripted(name, [1.0], log=log) for name in (OUTRIDER, PLAIN, TRANSFORMERS_PLAIN)]
    observer = Recorder()

    block = await run_block(systems, observer=observer)

    forwards = [OUTRIDER, PLAIN, TRANSFORMERS_PLAIN]
    assert log[-9:] == [*forwards, *reversed(forwards), *forwards]
    assert observer.num_ended == len(log) == num_rounds(len(systems), 3)
    assert {name: len(rounds) for name, rounds in block.rounds.items()} == dict.fromkeys(forwards, 3)


async def test_ratios_are_medians_over_pairs_and_blind_to_drift() -> None:
    # Warm-up, then a machine that gets slower all the time; outrider always takes half of what plain takes beside it.
    plain = Scripted(PLAIN, [9, 9, 1, 2, 4])
    outrider = Scripted(OUTRIDER, [9, 9, 0.5, 1, 2], stats(num_drafted=8, num_accepted=6, num_steps=4))

    fast, slow = cells_of(await run_block([outrider, plain]))

    assert (fast.system, slow.system) == (OUTRIDER, PLAIN)
    assert fast.ratio_to_plain == Estimate(2, 2, 2)
    assert fast.decode_ratio_to_plain == Estimate(2, 2, 2)
    assert fast.ttft_ratio_to_plain == Estimate(0.5, 0.5, 0.5)
    assert fast.tokens_per_s == Estimate(10, 7.5, 15)
    assert fast.plain_tokens_per_s == slow.tokens_per_s.value == 5
    assert fast.ttft_ms.value == pytest.approx(100)
    assert fast.acceptance_rate == Estimate(0.75, 0.75, 0.75)
    assert fast.mean_acceptance_length == 2.5
    assert fast.speculation_counts is not None
    assert fast.speculation_counts["num_accepted"] == 18
    assert (fast.tokens_equal, fast.num_runs) == (True, 3)
    assert slow.ratio_to_plain.value == 1
    assert (slow.acceptance_rate, slow.mean_acceptance_length) == (None, None)


async def test_a_batch_is_as_slow_as_its_slowest_completion() -> None:
    plain, outrider = Scripted(PLAIN, [1, 4]), Scripted(OUTRIDER, [1, 2])

    fast, slow = cells_of(await run_block([outrider, plain], Condition(2, 0), num_prompts=2))

    assert (fast.tokens_per_s.value, slow.tokens_per_s.value) == (10, 5)
    assert fast.ratio_to_plain.value == 2
    assert fast.num_runs == 2


async def test_other_tokens_are_told_at_once_and_name_the_prompt() -> None:
    observer = Recorder()

    block = await run_block([Scripted(OUTRIDER, [1], lies_about=1), Scripted(PLAIN, [1])], observer=observer)

    [difference] = observer.differences
    assert block.differences == (difference,)
    assert (difference.system, difference.task.prompt_index, difference.position) == (OUTRIDER, 1, 9)
    assert "prompt 1 ('prompt 1'...)" in str(difference)
    assert [cell.tokens_equal for cell in cells_of(block)] == [False, True]


async def test_transformers_draws_otherwise_above_temperature_0() -> None:
    def systems() -> list[Scripted]:
        return [Scripted(PLAIN, [1]), Scripted(TRANSFORMERS_PLAIN, [1], lies_about=0)]

    greedy, sampled = await run_block(systems()), await run_block(systems(), Condition(1, 0.8))

    assert [cell.tokens_equal for cell in cells_of(greedy)] == [True, False]
    assert [cell.tokens_equal for cell in cells_of(sampled)] == [True, None]
    assert not sampled.differences


async def test_a_failure_ends_the_measurement_as_itself() -> None:
    class Failing(Scripted):
        async def run(self, task: Task) -> Run:
            raise CommandFailed("lost")

    with pytest.raises(CommandFailed, match="lost"):
        await run_block([Failing(OUTRIDER, [1]), Scripted(PLAIN, [1])], Condition(2, 0))


async def measured() -> tuple[Cell, ...]:
    """All systems: outrider takes 0.4 s, transformers 0.9 s, all else 1 s."""
    fast = stats(num_drafted=10, num_accepted=8, num_steps=4)
    pair = [Scripted(OUTRIDER, [0.4], fast), Scripted(PLAIN, [1]), Scripted(TRANSFORMERS_PLAIN, [0.9])]
    others = [Scripted(WRONG_DRAFTER, [1]), Scripted(PLAIN, [1]), Scripted(NO_DRAFTER, [1])]
    blocks = [await run_block(systems) for systems in (pair, others)]
    return tuple(cell for block in blocks for cell in cells_of(block))


async def test_figures() -> None:
    memory = Memory({"target-worker": 700, "coordinator": 100, "draft-worker": 400})

    figures = {figure.name: figure for figure in figures_of(await measured(), memory)}

    assert {name: (round(figure.value, 3), figure.holds) for name, figure in figures.items()} == {
        "speedup": (2.5, True),
        "acceptance_rate": (0.8, True),
        "ttft_ratio": (0.4, True),
        "plain_vs_transformers": (0.9, False),
        "wrong_drafter_ratio": (1, True),
        "no_drafter_ratio": (1, True),
        "worst_concurrency": (2.5, True),
        "memory_ratio": (1.5, True),
    }
    assert figures["speedup"].needed == ">= 2.5"
    assert figures["memory_ratio"].spread is None


async def test_sampling_and_batches_have_figures_of_their_own() -> None:
    systems = [Scripted(OUTRIDER, [1], stats(1, 1, 1)), Scripted(PLAIN, [1])]

    def names(cells: Sequence[Cell]) -> list[str]:
        return [figure.name for figure in figures_of(cells, None)]

    assert names(cells_of(await run_block(systems, Condition(1, 0.8)))) == ["speedup_sampling", "worst_concurrency"]
    assert names(cells_of(await run_block(systems, Condition(2, 0)))) == ["worst_concurrency"]
    assert names(cells_of(await run_block(systems, Condition(1, 0, 20)))) == ["worst_latency"]
    assert names(cells_of(await run_block(systems, Condition(1, 0.8, 0, 0.5)))) == ["worst_acceptance"]


async def test_outrider_is_compared_with_every_other_system_round_by_round() -> None:
    names = (TRANSFORMERS_ASSISTED, TURNS, OUTRIDER, PLAIN, fixed_k_name(2), fixed_k_name(4))
    seconds = (1.6, 1.2, 1, 2, 0.9, 1.5)
    systems = [Scripted(name, [taken]) for name, taken in zip(names, seconds, strict=True)]

    cells = cells_of(await run_block(systems))

    figures = {figure.name: figure for figure in figures_of(cells, None)}
    assert (figures["over_turns"].value, figures["over_turns"].holds) == (pytest.approx(1.2), False)
    assert (figures["over_assisted"].value, figures["over_assisted"].holds) == (pytest.approx(1.6), True)
    assert (figures["over_best_k"].value, figures["over_best_k"].holds) == (pytest.approx(0.9), False)
    assert best_k_lines(cells) == [
        "Slower than outrider-fixed-2 (temperature 0): 0.90 of its tokens/s, standard error 0.00 (more than chance)."
    ]
    assert [cell.system for cell in cells if cell.ratios] == [OUTRIDER]


async def test_the_ideal_is_what_decoding_is_held_against() -> None:
    """A machine that is slow for one round is slow for the bare steps beside it too."""
    machine = [1.0, 4.0, 8.0]  # times as slow, by round
    steps = iter(BareSteps(0.1 * slow, 0.2 * slow, 0.14 * slow) for slow in machine for _ in range(2))

    async def time_bare() -> BareSteps:
        return next(steps)

    runs = [9.0, 9.0, *(one for slow in machine for one in (9.0, slow))]  # to warm up, and to settle before each
    systems = [Scripted(OUTRIDER, runs), Scripted(PLAIN, [2])]
    block = await run_block(systems, time_bare=time_bare)  # 9 tokens after the first, in 0.9 s

    cells = cells_of(replace(block, ideal=Ideal(6, 4.0)))

    assert [cell.ratio_to_ideal for cell in cells] == [Estimate(*[pytest.approx(0.5)] * 3), None]
    figures = {figure.name: figure for figure in figures_of(cells, None)}
    assert (figures["of_ideal_0ms"].value, figures["of_ideal_0ms"].holds) == (pytest.approx(0.5), False)
    assert (figures["forward_over_eager"].value, figures["forward_over_eager"].holds) == (pytest.approx(1.4), False)
    [line] = ideal_lines(cells)
    assert line.startswith("Ideal (temperature 0): 5 tokens/s, 4.00 per step of 800.00 ms with K = 6; reached 0.50")


def test_acceptance_lengths_at_full_k() -> None:
    yes, no = True, False
    assert mean_acceptance_length([[yes] * 9], 2) == 3
    assert mean_acceptance_length([[no] * 9], 2) == 1
    assert mean_acceptance_length([[yes, yes, no, yes, no, no, yes]], 3) == pytest.approx((3 + 2) / 2)
    with pytest.raises(ValueError, match="K = 4"):
        mean_acceptance_length([[yes] * 4], 4)


async def test_the_coordinators_time_goes_to_whoever_it_worked_for() -> None:
    idle, before = CoordinatorWork(0.0, 0, 0, 0), CoordinatorWork(1.0, 10, 10, 10)
    moments = iter([*[idle] * 8, before, CoordinatorWork(1.001, 14, 16, 14), before, before])  # warm-up comes first

    async def meter() -> CoordinatorWork:
        return next(moments)

    systems = [Scripted(OUTRIDER, [1]), Scripted(PLAIN, [1])]
    work = batches(["a"], GREEDY, 1, 10, 1)

    block = await measure(systems, GREEDY, work, Observer(), meter)

    mine, plain = cells_of(block)
    assert mine.coordinator_us_per_token is not None
    assert mine.coordinator_us_per_token.value == pytest.approx(100)
    assert mine.frames_per_step == (1.5, 1.0)
    assert (plain.coordinator_us_per_token, plain.frames_per_step) == (None, None)
    figures = {figure.name: (figure.value, figure.holds) for figure in figures_of([mine, plain], None)}
    assert (figures["frames_to_target"], figures["frames_from_target"]) == ((1.5, False), (1.0, True))


async def test_the_report_is_json_of_the_agreed_shape() -> None:
    memory = Memory({"target-worker": 700, "coordinator": 100, "draft-worker": 400})
    results = Results(await measured(), memory, ())

    whole = json.loads(json.dumps(report(results, {"cpu": "c"}, {"target": "t"}, {"repeats": 1}, "outrider bench")))

    assert {"machine", "pair", "command", "date", "cells", "figures"} <= set(whole)
    for cell in whole["cells"]:
        assert {
            *("system", "concurrency", "one_way_latency_ms", "temperature", "acceptance_rate", "tokens_per_s"),
            *("mean_acceptance_length", "spread", "ratio_to_plain", "ttft_ms", "ttft_ratio_to_plain", "tokens_equal"),
            *("num_runs", "decode_tokens_per_s"),
        } <= set(cell)
    assert {tuple(figure) for figure in whole["figures"].values()} == {("value", "spread", "needed", "holds")}
    assert sum(table.row_count for table in cells_tables(results.cells)) == len(results.cells)
    assert figures_table(figures_of(results.cells, memory)).row_count == 8
    assert equality_line(results).startswith("All 12 ")


@pytest.mark.parametrize(
    ("concurrency", "num_prompts", "wanted", "repeats"),
    [(1, 3, 1, 1), (2, 12, 1, 1), (32, 12, 1, 6), (8, 12, 2, 3), (8, 12, 4, 4)],
)
def test_batches_are_enough_for_a_median(concurrency: int, num_prompts: int, wanted: int, repeats: int) -> None:
    assert repeats_for(concurrency, num_prompts, wanted) == repeats


async def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    systems = [Scripted(OUTRIDER, [0.5]), Scripted(PLAIN, [1])]
    conditions = [GREEDY, Condition(1, 0.8), Condition(4, 0), Condition(1, 0, 5), Condition(1, 0.8, 0, 0.5)]
    cells = [cell for one in conditions for cell in cells_of(await run_block(systems, one))]

    plot_cells(cells, tmp_path / "cells.png")

    assert (tmp_path / "cells.png").read_bytes().startswith(b"\x89PNG")


def test_processor_time_is_what_a_process_says_of_itself() -> None:
    say = "import time; sum(range(10**6)); print(time.process_time(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", say], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdin is not None
        assert one.stdout is not None
        said_s = float(one.stdout.readline())
        found_s = cpu_seconds_of(one.pid)
        one.communicate("\n")
    assert found_s is not None
    assert 0 <= found_s - said_s < 0.005
    assert cpu_seconds_of(one.pid) is None


def test_resident_memory_is_read_from_proc() -> None:
    assert resident_bytes("Name:\tpython\nVmPeak:\t 9 kB\nVmRSS:\t    2048 kB\n") == 2 * 2**20
