"""``outrider``: the command line. Every failure is one line on stderr and an exit code, see `outrider.failures`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from typer.exceptions import TyperException

from outrider.commands.api_key import api_key
from outrider.commands.bench import bench
from outrider.commands.demo import demo
from outrider.commands.doctor import doctor
from outrider.commands.generate import generate
from outrider.commands.roles import STATUS_JSON, coordinator, draft_worker, report_failure, target_worker
from outrider.commands.simulate import simulate
from outrider.commands.up import up
from outrider.failures import BAD_INPUT, FAILED, INTERRUPTED, describe, one_line

TERMINATED = 143

app = typer.Typer(
    name="outrider",
    help="Speculative decoding across machines: the target model's exact output, faster.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command()(demo)
app.command()(up)
app.command()(generate)
app.command()(bench)
app.command()(doctor)
app.command()(simulate)
app.command()(coordinator)
app.command("api-key")(api_key)
app.command("draft-worker")(draft_worker)
app.command("target-worker")(target_worker)


@app.callback(invoke_without_command=True)
def outrider(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Speculative decoding across machines: the target model's exact output, faster."""
    if show_version:
        typer.echo(f"outrider {_version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The console script."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # or it tells the terminal of every connection that ends
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    try:
        return int(app(list(arguments), prog_name="outrider", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except asyncio.CancelledError:  # SIGTERM, see outrider.termination
        return TERMINATED
    except BrokenPipeError:  # whoever read our output has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except TyperException as error:
        return _fail(f"{one_line(error.format_message())} (see {_help_command(arguments)})", BAD_INPUT, arguments)
    except Exception as error:
        if os.environ.get("OUTRIDER_TRACEBACK"):
            raise
        return _fail(*describe(error), arguments)


def _fail(message: str, exit_code: int, arguments: Sequence[str]) -> int:
    if STATUS_JSON in arguments:
        report_failure(message, exit_code)
    else:
        typer.echo(f"outrider: {message}", err=True)
    return exit_code


def _help_command(arguments: Sequence[str]) -> str:
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    command = [argument for argument in arguments[:1] if argument in names]
    return " ".join(["outrider", *command, "--help"])


def _version() -> str:
    try:
        return version("outrider")
    except PackageNotFoundError:
        return "(not installed)"
