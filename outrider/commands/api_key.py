"""``outrider api-key``: makes an API key for the HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordinator.http.keys import hash_key, make_key, read_keys
from outrider.failures import BadUsage, CommandFailed


def api_key(
    name: Annotated[str, typer.Argument(help="Whose key it is, for log lines and limits.")],
    file: Annotated[Path, typer.Option("--file", metavar="FILE", help="Key file to add it to; made if need be.")],
) -> None:
    """Make an API key and add it to a key file.

    The key is printed and kept nowhere: the file has its hash alone. A coordinator that runs with --api-keys FILE
    takes it at once.
    """
    if not name or len(name.split()) != 1 or "#" in name:
        raise BadUsage(f"NAME is {name!r}; use a word without spaces and without #")
    if file.exists() and any(key.name == name for key in read_keys(file).values()):
        raise BadUsage(f"{file} has a key of {name!r} already; choose another name, or remove its line")
    key = make_key()
    _append(file, f"{name} sha256:{hash_key(key)}\n")
    typer.echo(key)


def _append(file: Path, line: str) -> None:
    try:
        if not file.exists():
            file.touch(mode=0o600)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(line)
    except OSError as error:
        raise CommandFailed(f"cannot write {file}: {error.strerror}") from None
