"""What is measured where: the stages of a bench, each one deployment and the conditions measured on it. Pure.

No cross product: everything is measured at one point (one request at a time, no latency) at every temperature, and
from there one axis varies at a time: concurrency and latency at the first temperature, acceptance at the last, where
the text of a synthetic pair does not repeat itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from outrider.bench.measure import Condition
from outrider.bench.settings import BenchSettings
from outrider.bench.systems import (
    NO_DRAFTER,
    OUTRIDER,
    PLAIN,
    TRANSFORMERS,
    TURNS,
    WRONG_DRAFTER,
    fixed_k_name,
)

PAIR: Final = "the pair"
WRONG: Final = "a drafter that is always wrong"
NONE: Final = "no drafter"
SYNTHETIC: Final = "a synthetic pair"


@dataclass(frozen=True, slots=True)
class Measurement:
    """Systems in turn under one condition, plain decoding among them."""

    condition: Condition
    systems: tuple[str, ...]
    """Plain in the middle, outrider beside it: each in turn, forwards and backwards."""
    repeats: int


@dataclass(frozen=True, slots=True)
class Stage:
    """One deployment and what is measured on it."""

    title: str
    measurements: tuple[Measurement, ...]

    @property
    def condition(self) -> Condition:
        """The first one: latency and acceptance belong to the deployment and are the same in all."""
        return self.measurements[0].condition

    @property
    def systems(self) -> frozenset[str]:
        """All that run in any of the measurements."""
        return frozenset(name for one in self.measurements for name in one.systems)

    @property
    def reports_plain(self) -> bool:
        """Plain decoding is measured in every stage; it is no cell of its own where nothing but the drafter differs."""
        return self.title in (PAIR, SYNTHETIC)


def stages_for(settings: BenchSettings) -> list[Stage]:
    """Everything that the settings ask for, in order; a stage without a system besides plain is left out."""
    wanted = settings.system_list
    stages = [_pair_stage(settings, latency_ms) for latency_ms in settings.latency_list]
    stages += [_synthetic_stage(settings, acceptance) for acceptance in settings.acceptance_list]
    stages += [_simple_stage(settings, title, name) for title, name in ((WRONG, WRONG_DRAFTER), (NONE, NO_DRAFTER))]
    return [stage for stage in stages if (stage.systems - {PLAIN}) or (stage.title == PAIR and PLAIN in wanted)]


def _pair_stage(settings: BenchSettings, latency_ms: float) -> Stage:
    first_concurrency, *more = settings.concurrency_list
    is_base = latency_ms == settings.latency_list[0]
    temperatures = settings.temperature_list if is_base else settings.temperature_list[:1]
    conditions = [Condition(first_concurrency, temperature, latency_ms) for temperature in temperatures]
    base = [
        Measurement(one, _pair_systems(settings, one), settings.num_repeats if is_base else 1) for one in conditions
    ]
    crowds = [Condition(count, settings.temperature_list[0], latency_ms) for count in more] if is_base else []
    return Stage(PAIR, (*base, *(Measurement(one, _pair_systems(settings, one), 1) for one in crowds)))


def _synthetic_stage(settings: BenchSettings, acceptance: float) -> Stage:
    condition = Condition(settings.concurrency_list[0], settings.temperature_list[-1], 0.0, acceptance)
    return Stage(SYNTHETIC, (Measurement(condition, _pair_systems(settings, condition), 1),))


def _simple_stage(settings: BenchSettings, title: str, name: str) -> Stage:
    systems = _chosen((name, PLAIN), settings.system_list)
    conditions = [Condition(settings.concurrency_list[0], temperature) for temperature in settings.temperature_list]
    return Stage(title, tuple(Measurement(one, systems, 1) for one in conditions))


def _pair_systems(settings: BenchSettings, condition: Condition) -> tuple[str, ...]:
    """transformers answers one request at a time, and knows of no far drafter."""
    is_single = condition == Condition(1, condition.temperature)
    fixed = tuple(map(fixed_k_name, settings.fixed_k_list)) if OUTRIDER in settings.system_list else ()
    return _chosen(
        (*(TRANSFORMERS if is_single else ()), TURNS, OUTRIDER, PLAIN, *fixed), (*settings.system_list, *fixed)
    )


def _chosen(systems: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in systems if name in wanted or name == PLAIN)
