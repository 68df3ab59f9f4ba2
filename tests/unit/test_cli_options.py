"""Flags, environment and file, all from one settings class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from outrider.failures import BadUsage
from outrider.options import load_settings


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="OUTRIDER_UP_", frozen=True, extra="forbid", populate_by_name=True)

    model: str
    port: int = Field(default=1, ge=0, le=65535)
    kind: Literal["a", "b"] = "a"
    targets: tuple[str, ...] = ()
    as_json: bool = Field(default=False, validation_alias="OUTRIDER_UP_JSON")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "outrider.toml"
    path.write_text('[up]\nmodel = "file"\nport = 2\njson = true\n\n[target]\nmodel = "elsewhere"\n')
    return path


def test_defaults() -> None:
    assert load_settings(Settings, "up", None, {"model": "m"}).port == 1


def test_the_file_beats_the_default(config: Path) -> None:
    settings = load_settings(Settings, "up", config, {})

    assert (settings.model, settings.port, settings.as_json) == ("file", 2, True)


def test_the_environment_beats_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_UP_PORT", "3")
    monkeypatch.setenv("OUTRIDER_UP_JSON", "false")

    settings = load_settings(Settings, "up", config, {})

    assert (settings.model, settings.port, settings.as_json) == ("file", 3, False)


def test_a_flag_beats_all(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_UP_PORT", "3")
    monkeypatch.setenv("OUTRIDER_UP_JSON", "false")

    settings = load_settings(Settings, "up", config, {"port": 4, "as_json": True})

    assert (settings.model, settings.port, settings.as_json) == ("file", 4, True)


def test_a_violation_names_flag_variable_and_key() -> None:
    with pytest.raises(BadUsage, match=r"--port \(OUTRIDER_UP_PORT, or port in \[up\]\): .*65535, got 99999"):
        load_settings(Settings, "up", None, {"model": "m", "port": 99999})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(BadUsage, match=r"--model is missing .*OUTRIDER_UP_MODEL"):
        load_settings(Settings, "up", None, {})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[up]\nspeed = 11\n", "'speed'"),
        ("[sideways]\nx = 1\n", "sideways"),
        ("port = 1\n", "port"),
        ("[up\n", "not TOML"),
        ('[up]\nmodel = "m"\nkind = "c"\n', "--kind"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)

    with pytest.raises(BadUsage, match=named):
        load_settings(Settings, "up", path, {})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match="No such file"):
        load_settings(Settings, "up", tmp_path / "none.toml", {})
