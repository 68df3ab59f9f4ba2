"""Where a model's files come from, and what to say when they do not come.

The hub library retries for half a minute when there is no network and reports failures in paragraphs. Here a name is
looked for in the local cache first, the hub is asked once with a short timeout, and every failure becomes one line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from textwrap import shorten
from typing import TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from transformers.utils import logging as transformers_logging

from inference.errors import ModelLoadError, ModelNotFound

T = TypeVar("T")

_HUB_TIMEOUT_S = 5.0
_MAX_REASON_LENGTH = 200
_LOOKS_LIKE_A_PATH = (".", "/", "~", os.sep)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def fetch(name: str, load: Callable[[bool], T]) -> T:
    """Call `load(local_files_only)` so that a folder or the local cache answers first, and the hub only if need be.

    Raises:
        ModelNotFound: the name leads nowhere. Whatever `load` raises passes through.
    """
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise ModelNotFound(f"{name} is a folder without a config.json: give the folder of a Hugging Face model")
        return load(True)
    if name.startswith(_LOOKS_LIKE_A_PATH) or Path(name).exists() or not _HUB_NAME.fullmatch(name):
        raise ModelNotFound(f"{name} is not a folder: give the folder of a Hugging Face model, or its name on the hub")
    try:
        return load(True)
    except OSError:
        # Not in the cache, or not all of it.
        _ask_hub(name)
        return load(False)


def _ask_hub(name: str) -> None:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = Request(f"{endpoint}/{name}/resolve/main/config.json", method="HEAD")
    try:
        urlopen(request, timeout=_HUB_TIMEOUT_S).close()
    except HTTPError as error:
        # 401 and 403 may be a private or gated model: the hub library knows the user's token, so let it try.
        if error.code == HTTPStatus.NOT_FOUND:
            raise ModelNotFound(f"{name} is neither a folder here nor a model on {endpoint}") from error
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ModelNotFound(
            f"{name} is not a folder here, not in the local hub cache, and {endpoint} cannot be reached ({reason}): "
            "give a folder, or download the model first"
        ) from error


@contextmanager
def explain(name: str, advice: str) -> Iterator[None]:
    """Turn whatever transformers raises into one `ModelLoadError` of one line, ending in what to do."""
    try:
        yield
    except ModelLoadError:
        raise
    # Loading runs code of four libraries over files that we know nothing about: any exception is a load failure.
    except Exception as error:
        reason = shorten(str(error) or type(error).__name__, _MAX_REASON_LENGTH, placeholder=" ...")
        raise ModelLoadError(f"{name} cannot be loaded ({reason}): {advice}") from error


@contextmanager
def quiet_progress() -> Iterator[None]:
    """No progress bars of transformers: the caller reports progress in its own way."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
