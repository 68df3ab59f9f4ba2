"""API keys from a file that holds only their hashes, read again whenever it changes.

A line of the file is ``NAME sha256:HEX``, and may go on with limits of its own: ``rpm=60 concurrent=4``. Empty lines
and what follows a ``#`` are nothing. Keys are long random strings (``outrider api-key`` makes them), so that a plain
SHA-256 cannot be turned around.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rpc.errors import FieldViolation, InvalidRequest

KEY_PREFIX = "outrider-"
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_LIMIT = re.compile(r"(rpm|concurrent)=([0-9]{1,9})")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A client, and its own limits where it has them; 0 is no limit."""

    name: str
    sha256: str
    requests_per_minute: int | None = None
    max_concurrent: int | None = None


class KeyFile:
    """The keys that are good now."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises `InvalidRequest` if it cannot be read, or a line of it cannot."""
        self._path = path
        self._version = _version_of(path)
        self._keys = read_keys(path)

    def find(self, secret: str) -> ApiKey | None:
        """The key's entry; None if it has none. Costs one look at the file's date."""
        self._reload()
        return self._keys.get(hash_key(secret))

    def _reload(self) -> None:
        """A file that has become unreadable changes nothing: a half-written one must not lock everybody out."""
        version = _version_of(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(self._path)
        except InvalidRequest as error:
            _log.error("%s; the %d keys read before stay good", error.message, len(self._keys))
        else:
            _log.info("read %d API keys from %s", len(self._keys), self._path)


def read_keys(path: Path) -> Mapping[str, ApiKey]:
    """Entries by hash. Raises `InvalidRequest` naming the line at fault."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    entries = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
    return {entry.sha256: entry for entry in entries if entry is not None}


def make_key() -> str:
    """A new secret of 256 bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _parse(path: Path, number: int, line: str) -> ApiKey | None:
    words = line.partition("#")[0].split()
    if not words:
        return None
    found = _HASH.fullmatch(words[1]) if len(words) > 1 else None
    limits = [_LIMIT.fullmatch(word) for word in words[2:]]
    if found is None or None in limits:
        raise _bad(
            f"line {number} of {path} is not NAME sha256:HEX [rpm=N] [concurrent=N]; outrider api-key writes such lines"
        )
    given = {limit[1]: int(limit[2]) for limit in limits if limit is not None}
    return ApiKey(words[0], found[1], given.get("rpm"), given.get("concurrent"))


def _bad(problem: str) -> InvalidRequest:
    return InvalidRequest(FieldViolation("api_keys", problem))


def _version_of(path: Path) -> tuple[int, int, int] | None:
    """What changes with the file's content; None while there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
