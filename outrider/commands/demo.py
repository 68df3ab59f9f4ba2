"""``outrider demo``: the local stack on the demo pair, live text, then speculative and plain side by side."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from outrider.client import Client, Event, Finished, Started, Tokens
from outrider.demo import PROMPT, Comparison, OnEvent, Task, compare, median, report
from outrider.display import Progress, TokenPrinter
from outrider.failures import CommandFailed
from outrider.launcher import LocalStack, stack_options
from outrider.options import with_settings
from outrider.settings import DemoSettings
from outrider.termination import cancel_on_sigterm


@with_settings(DemoSettings, "demo")
def demo(settings: DemoSettings, config: Path | None = None) -> None:
    """Compare speculative and plain decoding, live.

    Starts the local stack on the demo pair, streams a completion, and prints both ways side by side.
    """
    comparison = asyncio.run(_demo(settings, config))
    if settings.as_json:
        typer.echo(json.dumps(report(comparison), ensure_ascii=False))
    else:
        console = Console(highlight=False)
        console.print(_table(comparison))
        console.print(_verdict(comparison), soft_wrap=True)
    if not comparison.tokens_equal:
        raise CommandFailed(f"the tokens differ from output token {comparison.first_difference} on: this is a defect")


async def _demo(settings: DemoSettings, config: Path | None) -> Comparison:
    cancel_on_sigterm()
    task = Task(settings.prompt or PROMPT, settings.max_tokens, settings.temperature, settings.seed)
    show = _show_nothing if settings.as_json else _live_printer(task)
    with Progress() as progress:
        async with LocalStack(stack_options(settings, config), progress.show) as stack:
            progress.done()
            async with Client(stack.address) as client:
                return await compare(client, task, settings.repeats, show)


def _live_printer(task: Task) -> OnEvent:
    """Prints prompt and completion as they come, piped output included."""
    printer = TokenPrinter(Console(highlight=False))

    def show(event: Event) -> None:
        match event:
            case Started():
                printer.legend()
                printer.prompt(task.prompt, everywhere=True)
            case Tokens():
                printer.tokens(event)
            case Finished():
                printer.end()
                typer.echo("\nthe same again, plain and speculative in turn ...\n", err=True)

    return show


def _show_nothing(event: Event) -> None:
    pass


def _table(comparison: Comparison) -> Table:
    table = Table("", "speculative", "plain")
    for name, value in (
        ("tokens", lambda run: float(len(run.completion.token_ids))),
        ("time to first token, ms", lambda run: 1000 * run.first_token_s),
        ("time, s", lambda run: run.total_s),
        ("tokens/s", lambda run: run.tokens_per_s),
    ):
        table.add_row(name, *(_number(median(map(value, runs))) for runs in (comparison.speculative, comparison.plain)))
    table.add_section()
    table.add_row("speedup", f"{comparison.speedup:.2f}", "1")
    table.add_row("acceptance rate", f"{comparison.acceptance_rate:.2f}", "")
    table.add_row("looked up, accepted", f"{comparison.num_looked_up_accepted} of {comparison.num_looked_up}", "")
    table.add_row("mean acceptance length", f"{comparison.mean_acceptance_length:.2f}", "1")
    table.add_row("mean K", f"{comparison.mean_k:.1f}", "0")
    return table


def _verdict(comparison: Comparison) -> str:
    same = "Both ways gave the same tokens" if comparison.tokens_equal else "The two ways gave DIFFERENT TOKENS"
    policy = comparison.speculative[0].completion.speculation.policy
    return f"{same}. Medians over {len(comparison.plain)} pairs of runs; K chosen by the {policy} policy."


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"
