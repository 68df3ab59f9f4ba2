"""Tiny models, and one running deployment that most tests share."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.doubles.tiny_models import byte_level_tokenizer, perturbed, save, tiny_llama
from tests.e2e.processes import Up, running_up

MAX_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Models:
    target: str
    twin: str
    """Says what the target says, in an eightieth of its layers: everything it drafts is right."""
    cousin: str
    """The twin's weights with some noise: much that it drafts is right."""
    stranger: str
    """Other weights: nearly everything it drafts is wrong."""
    foreign: str
    """Another vocabulary of the same size."""


def pytest_configure() -> None:
    """A shell that starts the tests in the background has them, and every process they start, ignore Ctrl-C.

    A handler that is Python's is the default again in a child; one told to do so between fork and exec would run
    gRPC's handlers of a fork there, which has failed.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root: Path = tmp_path_factory.mktemp("models")
    twin, stranger = (tiny_llama(seed, max_context=MAX_CONTEXT) for seed in (1, 2))
    return Models(
        target=str(save(deepened(twin, num_layers=160), root / "target")),
        twin=str(save(twin, root / "twin")),
        cousin=str(save(perturbed(twin, 0.01), root / "cousin")),
        stranger=str(save(stranger, root / "stranger")),
        foreign=str(save(twin, root / "foreign", with_two_tokens_exchanged(byte_level_tokenizer()))),
    )


def deepened(model: LlamaForCausalLM, num_layers: int) -> LlamaForCausalLM:
    """A model that says the same and takes longer: the layers added add nothing."""
    config = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": num_layers})
    deep = LlamaForCausalLM(config).eval()
    deep.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for layer in deep.model.layers[model.config.num_hidden_layers :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return deep


def with_two_tokens_exchanged(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokens under other ids."""
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="session")
def up(models: Models) -> Iterator[Up]:
    """A deployment whose draft worker is right often, and often wrong."""
    with running_up("--target", models.target, "--draft", models.cousin, "--policy=fixed", "--max-k=4") as up:
        yield up
        exit_code, alive = up.end(signal.SIGTERM)
    assert (exit_code, alive) == (143, [])
