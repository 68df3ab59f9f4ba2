"""What ``outrider bench`` measures where, and the settings that say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from outrider.bench.measure import Condition
from outrider.bench.plan import NONE, PAIR, SYNTHETIC, WRONG, Stage, stages_for
from outrider.bench.settings import BenchSettings
from outrider.bench.stages import read_prompts, stage_options
from outrider.bench.systems import (
    NO_DRAFTER,
    OUTRIDER,
    PLAIN,
    SYSTEMS,
    TRANSFORMERS,
    TRANSFORMERS_PLAIN,
    TURNS,
    WRONG_DRAFTER,
    fixed_k,
    fixed_k_name,
    served_system,
)
from outrider.client import Client, Speculation
from outrider.failures import BadUsage
from outrider.launcher import StackOptions
from outrider.options import load_settings


def planned(**flags: object) -> list[Stage]:
    return stages_for(load_settings(BenchSettings, "bench", None, flags))


def test_every_system_is_measured_beside_plain() -> None:
    stages = planned()

    assert set(SYSTEMS) <= {name for stage in stages for name in stage.systems}
    assert all(PLAIN in one.systems for stage in stages for one in stage.measurements)
    assert [stage.systems for stage in planned(systems=NO_DRAFTER, acceptances="", fixed_ks="")][-1] == {
        NO_DRAFTER,
        PLAIN,
    }


def test_one_axis_varies_at_a_time() -> None:
    stages = planned(concurrency="1,4", latencies="0,20", acceptances="0.5", temperatures="0,0.8")

    found = [(stage.title, [one.condition for one in stage.measurements]) for stage in stages]
    single = [Condition(1, 0), Condition(1, 0.8)]
    assert found == [
        (PAIR, [*single, Condition(4, 0)]),
        (PAIR, [Condition(1, 0, 20)]),
        (SYNTHETIC, [Condition(1, 0.8, 0, 0.5)]),
        (WRONG, single),
        (NONE, single),
    ]


def test_transformers_serves_one_at_a_time_and_nearby() -> None:
    base, *others = planned(systems=f"{OUTRIDER},{TRANSFORMERS_PLAIN}", concurrency="1,2", fixed_ks="4")

    assert base.measurements[0].systems == (TRANSFORMERS_PLAIN, OUTRIDER, PLAIN, fixed_k_name(4))
    elsewhere = [*base.measurements[2:], *(one for stage in others for one in stage.measurements)]
    assert all(not set(one.systems) & set(TRANSFORMERS) for one in elsewhere)


def test_quick_is_one_stage() -> None:
    [stage] = planned(quick=True)

    expected = {OUTRIDER, PLAIN, TURNS, *TRANSFORMERS}
    assert [(one.condition, set(one.systems)) for one in stage.measurements] == [
        (Condition(1, 0), expected),
        (Condition(1, 0.8), expected),
    ]


def test_each_stage_has_its_own_deployment() -> None:
    options, folder = StackOptions("target", "draft"), Path("made")
    stages = planned(latencies="0,20", acceptances="0.5")

    near, far, synthetic, wrong, none = (stage_options(options, stage, folder) for stage in stages)

    assert near == options
    assert far == replace(options, draft_latency_ms=20)
    assert synthetic == replace(options, target="made/target-0.5", draft="made/draft")
    assert wrong == replace(options, draft="made/wrong")
    assert none == replace(options, draft=None)


def test_names_say_how_to_speculate() -> None:
    client = Client("nowhere:1")
    assert served_system(PLAIN, client).speculation == Speculation(disabled=True)
    assert served_system(OUTRIDER, client).speculation == Speculation()
    assert served_system(TURNS, client).speculation == Speculation(turns=True)
    assert served_system(fixed_k_name(3), client).speculation == Speculation(policy="fixed", k=3)
    assert (fixed_k(fixed_k_name(3)), fixed_k(OUTRIDER)) == (3, None)


def test_settings_hold_lists_and_quick_defaults() -> None:
    settings = load_settings(BenchSettings, "bench", None, {"concurrency": "1, 4", "quick": True, "repeats": 3})

    assert (settings.concurrency_list, settings.latency_list) == ((1, 4), (0,))
    assert (settings.acceptance_list, settings.fixed_k_list) == ((), ())
    assert settings.system_list == tuple(name for name in SYSTEMS if name not in (WRONG_DRAFTER, NO_DRAFTER))
    assert (settings.num_prompts, settings.num_tokens, settings.num_repeats) == (3, 32, 3)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("systems", "outrider,warp"),
        ("concurrency", "0"),
        ("concurrency", "many"),
        ("latencies", "-1"),
        ("acceptances", "1.5"),
        ("fixed_ks", "0"),
        ("temperatures", "-1"),
        ("temperatures", "nan"),
        ("max_tokens", 1),
        ("prompts", 0),
    ],
)
def test_bad_settings_name_the_flag(flag: str, value: object) -> None:
    with pytest.raises(BadUsage, match="--" + flag.replace("_", "-")):
        load_settings(BenchSettings, "bench", None, {flag: value})


def test_prompts_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text('{"prompts": ["def f("]}')

    assert read_prompts(file) == ["def f("]
    for bad in ("[]", '{"prompts": []}', '{"prompts": [1]}', "no JSON"):
        file.write_text(bad)
        with pytest.raises(BadUsage, match="prompts"):
            read_prompts(file)
    with pytest.raises(BadUsage, match="--prompt-file"):
        read_prompts(tmp_path / "none.json")
