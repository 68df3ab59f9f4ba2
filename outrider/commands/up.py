"""``outrider up``: the local stack until Ctrl-C."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import typer

from outrider.display import Progress
from outrider.launcher import DRAFT, TARGET, LocalStack, StackOptions, stack_options
from outrider.options import with_settings
from outrider.settings import UpSettings
from outrider.termination import cancel_on_sigterm


@with_settings(UpSettings, "up")
def up(settings: UpSettings, config: Path | None = None) -> None:
    """Run all three roles here until Ctrl-C.

    A draft worker, a target worker and a coordinator, as three processes that end with this one.
    The tables [target], [draft] and [coordinator] of the --config file hold for the three processes.
    """
    asyncio.run(_serve(_options(settings, config)))


async def _serve(options: StackOptions) -> None:
    cancel_on_sigterm()
    with Progress() as progress:
        async with LocalStack(options, progress.show) as stack:
            progress.done()
            _announce(options, stack)
            try:
                raise await stack.failed()
            except asyncio.CancelledError:
                typer.echo("stopping, once the requests under way are through or after some seconds", err=True)
                raise


def _announce(options: StackOptions, stack: LocalStack) -> None:
    draft = "none: plain decoding" if options.draft is None else f"{options.draft} (pid {stack.pids[DRAFT]})"
    http = f"http://{stack.http_address}/v1" if stack.http_address else "none"
    typer.echo(
        f"target  {options.target} (pid {stack.pids[TARGET]})\n"
        f"draft   {draft}\n"
        f"gRPC    {stack.address}\n"
        f"HTTP    {http}\n"
        f'Try     outrider generate --address {stack.address} "def fibonacci(n):"\n'
        "Ctrl-C stops all three."
    )


def _options(settings: UpSettings, config: Path | None) -> StackOptions:
    options = stack_options(settings, config, drafting=not settings.no_draft)
    http_port = None if settings.no_http else settings.http_port
    return dataclasses.replace(options, host=settings.host, grpc_port=settings.grpc_port, http_port=http_port)
