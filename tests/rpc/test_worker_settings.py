"""What is refused before a worker loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpc.worker_settings import check_model_name


@pytest.mark.parametrize("name", ["", "gpt2", "org/model-1.5_b", "org"])
def test_what_may_be_on_the_hub_is_left_to_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert check_model_name(name) == name


def test_a_folder_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    assert check_model_name("model") == "model"
    assert check_model_name("./model") == "./model"
    assert check_model_name(str(tmp_path / "model")) == str(tmp_path / "model")


@pytest.mark.parametrize("name", ["empty", "./empty", ".", "file", "./none", "/no/such/model", "~/model", "../model"])
def test_what_is_meant_as_a_folder_and_is_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match="folder") as refused:
        check_model_name(name)

    assert repr(name) in str(refused.value)
