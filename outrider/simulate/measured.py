"""What was measured and can be simulated: cells of a benchmark's JSON, or what a validation measures itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from outrider.bench.systems import OUTRIDER, PLAIN
from outrider.failures import BadUsage
from outrider.launcher import StackOptions, demo_pair
from outrider.simulate.settings import TURNS

_FIXED: Final = "outrider-fixed-"

DEFAULT_POLICY: Final = "goodput"
DEFAULT_K: Final = 12
"""The coordinator's."""


DEMO_PAIR: Final[Mapping[str, Any]] = {
    "target": "models/target",
    "draft": "models/draft",
    "device": "auto",
    "dtype": "auto",
}
"""As a benchmark names it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A greedy cell that can be simulated."""

    system: str
    policy: str | None
    """None is plain decoding."""
    k: int
    concurrency: int
    latency_ms: float
    num_tokens: int
    """Of each completion."""
    num_runs: int = 0
    tokens_per_s: float = 0.0
    """0: not measured yet."""

    @property
    def streams(self) -> bool:
        """Do both models work at the same time?"""
        return self.policy is not None and self.system != TURNS

    @property
    def is_usual(self) -> bool:
        """One request at a time under the default policy, with a drafter next door."""
        setting = (self.system, self.policy, self.k, self.concurrency, self.latency_ms)
        return setting == (OUTRIDER, DEFAULT_POLICY, DEFAULT_K, 1, 0.0)

    @property
    def name(self) -> str:
        detail = "" if self.policy is None else f", {self.policy} K {self.k}"
        return f"{self.system}{detail}"


def read_bench(file: Path) -> dict[str, Any]:
    """What ``outrider bench --json`` wrote. Raises `BadUsage`."""
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadUsage(f"--bench {file}: {error.strerror}") from None
    except ValueError:
        whole = None
    if not isinstance(whole, dict) or not {"cells", "pair", "settings"} <= whole.keys():
        raise BadUsage(f"--bench {file}: is no output of outrider bench --json")
    return whole


def measured_cells(whole: Mapping[str, Any]) -> list[Measured]:
    """The cells that can be simulated: greedy, on the pair itself, by systems of ours."""
    return [
        _measured(cell, whole)
        for cell in whole["cells"]
        if cell["temperature"] == 0 and cell.get("wanted_acceptance") is None and _policy(cell["system"], whole)
    ]


def _measured(cell: Mapping[str, Any], whole: Mapping[str, Any]) -> Measured:
    policy, k = _policy(cell["system"], whole) or ("", 0)
    counts = cell.get("speculation_counts") or {}
    length = cell["mean_acceptance_length"]
    max_tokens = int(whole["settings"]["max_tokens"])
    num_tokens = round(length * counts["num_steps"] / cell["num_runs"]) if counts and length else max_tokens
    return Measured(
        system=cell["system"],
        policy=policy or None,
        k=k,
        concurrency=int(cell["concurrency"]),
        latency_ms=float(cell["one_way_latency_ms"]),
        num_tokens=num_tokens,
        num_runs=int(cell["num_runs"]),
        tokens_per_s=float(cell["tokens_per_s"]),
    )


def _policy(system: str, whole: Mapping[str, Any]) -> tuple[str, int] | None:
    """How K is chosen, and the greatest; None for a system that is not simulated."""
    pair = whole["pair"]
    max_k = DEFAULT_K if pair.get("max_k") is None else int(pair["max_k"])
    if system == PLAIN:
        return "", 0
    if system in (OUTRIDER, TURNS):
        return pair.get("policy") or DEFAULT_POLICY, max_k
    if system.startswith(_FIXED):
        return "fixed", int(system.removeprefix(_FIXED))
    return None


def pair_options(whole: Mapping[str, Any]) -> StackOptions:
    """The workers that the benchmark ran; a folder that is not here is looked for in the source tree."""
    pair = whole["pair"]
    target, draft = str(pair["target"]), str(pair["draft"])
    if (target, draft) == (DEMO_PAIR["target"], DEMO_PAIR["draft"]):
        target, draft = demo_pair()
    threads = int(pair.get("target_threads") or 0)
    return StackOptions(target, draft, device=pair["device"], dtype=pair["dtype"], target_threads=threads)
