"""Tiny models, and one running deployment that most tests share."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.doubles.tiny_models import byte_level_tokenizer, perturbed, save, tiny_llama
from tests.e2e.processes import Up, running_up

MAX_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Models:
    target: str
    twin: str
    """The target's own weights: everything it drafts is right."""
    cousin: str
    """The target's weights with some noise: much that it drafts is right."""
    stranger: str
    """Other weights: nearly everything it drafts is wrong."""
    foreign: str
    """Another vocabulary of the same size."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root: Path = tmp_path_factory.mktemp("models")
    target, stranger = (tiny_llama(seed, max_context=MAX_CONTEXT) for seed in (1, 2))
    return Models(
        target=str(save(target, root / "target")),
        twin=str(save(target, root / "twin")),
        cousin=str(save(perturbed(target, 0.03), root / "cousin")),
        stranger=str(save(stranger, root / "stranger")),
        foreign=str(save(target, root / "foreign", with_two_tokens_exchanged(byte_level_tokenizer()))),
    )


def with_two_tokens_exchanged(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokens under other ids."""
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="session")
def up(models: Models) -> Iterator[Up]:
    """A deployment whose draft worker is right often, and often wrong."""
    with running_up("--target", models.target, "--draft", models.cousin) as up:
        yield up
        exit_code, alive = up.end(signal.SIGTERM)
    assert (exit_code, alive) == (143, [])
