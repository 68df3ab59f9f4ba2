"""The other end of `outrider.bench.json_process`: questions on standard input, answers on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

Answerer: TypeAlias = Callable[[dict[str, Any]], dict[str, object]]


def serve(load: Callable[[], Answerer]) -> None:
    """Loads, says that it is ready, and answers until the input ends. What cannot be loaded is told and ends it."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # standard output is for the answers alone: what libraries print goes to stderr
    try:
        answer = load()
    except (OSError, ValueError, RuntimeError) as error:
        answers.write(json.dumps({"error": f"cannot load: {error}"}) + "\n")
        return
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
