"""``outrider generate``: one completion from a running coordinator."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from outrider.client import (
    Client,
    Completion,
    Event,
    Finished,
    SamplingOptions,
    Speculation,
    StructuredOutput,
    Tokens,
    collect,
)
from outrider.display import TokenPrinter
from outrider.failures import BadUsage
from outrider.options import with_settings
from outrider.settings import GenerateSettings
from telemetry.tracing import make_tracing

Prompt = Annotated[str | None, typer.Argument(help="What to complete; '-' or nothing reads standard input.")]
PromptFile = Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Read the prompt from this file.")]


@with_settings(GenerateSettings, "generate")
def generate(settings: GenerateSettings, prompt: Prompt = None, file: PromptFile = None) -> None:
    """Complete a prompt with a running coordinator.

    On a terminal drafted, looked-up and target tokens are shown apart; elsewhere only the text is printed.
    """
    asyncio.run(_generate(settings, read_prompt(prompt, file)))


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the one place that has it, exactly as it is there. Raises `BadUsage`."""
    if prompt is not None and file is not None:
        raise BadUsage("a prompt and --file: give one of them")
    if file is not None:
        return _decode(_read(file, "--file"), f"--file {file}")
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin is None or (sys.stdin.isatty() and prompt is None):
        raise BadUsage("no prompt: give it as an argument, with --file, or on standard input")
    return _decode(sys.stdin.buffer.read(), "standard input")


async def _generate(settings: GenerateSettings, prompt: str) -> None:
    _check_shown(settings)
    with closing(make_tracing("client")) as tracing:
        async with Client(settings.address, tracing) as client, aclosing(_request(client, settings, prompt)) as events:
            if settings.as_json:
                found = [event async for event in events]
                objects = [completion_object(collect(found, choice)) for choice in range(settings.n or 1)]
                answer = objects[0] if settings.n is None else {"choices": objects}
                typer.echo(json.dumps(answer, ensure_ascii=False))
            else:
                await _show(events, prompt)


def _check_shown(settings: GenerateSettings) -> None:
    """Raises `BadUsage` for what would be computed and then not told."""
    if settings.as_json:
        return
    if (settings.n or 1) > 1:
        raise BadUsage(f"--n {settings.n}: several answers at a time cannot be shown; add --json")
    if settings.logprobs is not None or settings.prompt_logprobs is not None:
        name = "--prompt-logprobs" if settings.logprobs is None else "--logprobs"
        raise BadUsage(f"{name}: logprobs are told in JSON only; add --json")


def completion_object(completion: Completion) -> dict[str, object]:
    """What ``--json`` prints."""
    return dataclasses.asdict(completion)


def _request(client: Client, settings: GenerateSettings, prompt: str) -> AsyncGenerator[Event, None]:
    return client.generate(
        prompt,
        model=settings.model,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
        structured_output=_structured_output(settings),
        speculation=Speculation(
            disabled=not settings.speculation,
            policy=settings.policy or "",
            k=settings.k,
            method=settings.method or "",
            draft_top_n=settings.draft_top_n,
        ),
        **_options(settings),
    )


def _options(settings: GenerateSettings) -> SamplingOptions:
    return SamplingOptions(
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        logit_bias=dict(_bias(text) for text in settings.logit_bias),
        bad_words=settings.bad_words,
        min_tokens=settings.min_tokens,
        n=settings.n,
        stop=(settings.stop,) if settings.stop else (),
        include_stop_str_in_output=settings.include_stop_str_in_output,
        logprobs=settings.logprobs,
        prompt_logprobs=settings.prompt_logprobs,
    )


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition(":")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise BadUsage(f"--logit-bias {text!r}: give it as TOKEN_ID:BIAS, for example 40:-5") from None


def _structured_output(settings: GenerateSettings) -> StructuredOutput | None:
    """What the flags say. Raises `BadUsage` if a file cannot be read or more than one is given."""
    flags = {
        "--json-schema": settings.json_schema is not None,
        "--json-object": settings.json_object,
        "--regex": settings.regex is not None,
        "--grammar": settings.grammar is not None,
    }
    given = [flag for flag, is_given in flags.items() if is_given]
    if len(given) > 1:
        raise BadUsage(f"{' and '.join(given)}: give one of them")
    if not given:
        return None
    return StructuredOutput(
        json_schema=_text_of(settings.json_schema, "--json-schema"),
        json_object=settings.json_object,
        regex=settings.regex,
        grammar=_text_of(settings.grammar, "--grammar"),
    )


def _text_of(file: Path | None, flag: str) -> str | None:
    return None if file is None else _decode(_read(file, flag), f"{flag} {file}")


async def _show(events: AsyncGenerator[Event, None], prompt: str) -> None:
    printer = TokenPrinter(Console(highlight=False))
    async for event in events:
        match event:
            case Tokens():
                printer.tokens(event)
            case Finished():
                printer.end()
                printer.summary(event)
            case _:  # shown only once the server has admitted the request
                printer.legend()
                printer.prompt(prompt)


def _read(file: Path, flag: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadUsage(f"{flag} {file}: {error.strerror}") from None


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadUsage(f"{source} is not UTF-8 (byte {error.start})") from None
