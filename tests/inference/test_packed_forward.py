"""The packed forward over the paged cache gives what transformers' own full forward gives, without a cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from inference import Chunk, PagedRuntime, SamplingRow, SequenceId, draw, load_model
from inference.sdpa_attention import SdpaBackend

from .tiny_models import CONFIGS, VOCAB_SIZE, WINDOW, save_tiny_model

TOLERANCE = 2e-5
"""Absolute, on logits with a standard deviation of about 1 to 3."""


class Checker:
    """Runs sequences on a runtime and checks every logit against a full forward of the same tokens."""

    def __init__(self, reference: PreTrainedModel, runtime: PagedRuntime) -> None:
        self.reference = reference
        self.runtime = runtime
        self.tokens: dict[SequenceId, list[int]] = {}
        self._random = random.Random(7)

    def open(self) -> SequenceId:
        sequence = self.runtime.open()
        self.tokens[sequence] = []
        return sequence

    def step(self, *batch: tuple[SequenceId, int, int]) -> None:
        """One forward of (sequence, number of new tokens, number of logits) each, checked row by row."""
        chunks = [Chunk(sequence, self._draw(num_tokens), num_logits) for sequence, num_tokens, num_logits in batch]
        got = self.runtime.forward(chunks)
        assert got.dtype == torch.float32
        for chunk in chunks:
            self.tokens[chunk.sequence] += chunk.token_ids
        expected = [self._full_forward(chunk.sequence, chunk.num_logits) for chunk in chunks]
        torch.testing.assert_close(got, torch.cat(expected), atol=TOLERANCE, rtol=1e-5)
        self.runtime.check_integrity()

    def truncate(self, sequence: SequenceId, length: int) -> None:
        self.runtime.truncate(sequence, length)
        del self.tokens[sequence][length:]

    def fork(self, sequence: SequenceId) -> SequenceId:
        fork = self.runtime.fork(sequence)
        self.tokens[fork] = list(self.tokens[sequence])
        return fork

    def _draw(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(VOCAB_SIZE) for _ in range(num_tokens)]

    def _as_input(self, sequence: SequenceId) -> torch.Tensor:
        return torch.tensor([self.tokens[sequence]], device=self.reference.device)

    def _full_forward(self, sequence: SequenceId, num_logits: int) -> torch.Tensor:
        with torch.inference_mode():
            logits = self.reference(self._as_input(sequence), use_cache=False).logits[0]
        return logits[len(logits) - num_logits :]


STORED_IN_HALF = " stored in bfloat16"
COMPILED_IN_HALF = " compiled, stored in bfloat16"
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    STORED_IN_HALF: {},
    " by transformers": {"fuse": False},
    " with sdpa": {"backend": SdpaBackend()},
    " by transformers with sdpa": {"fuse": False, "backend": SdpaBackend()},
    " in fixed sizes": {"graphs": lambda compute: compute},
    " compiled": {"compiled": True},
    COMPILED_IN_HALF: {"compiled": True},
}
"""What is not the default on a CPU. A GPU runs by sdpa, and in fixed sizes, which are recorded as graphs there. What is
stored in half precision runs on packed weights on a CPU, and a small draft is compiled there."""

OF_ALL = ("", STORED_IN_HALF)
"""Ways of every architecture; the others are tried with those of `OF_SOME`."""
OF_SOME = ("llama-gqa", "mistral")


@pytest.fixture(
    scope="module",
    params=[(name, way) for name in sorted(CONFIGS) for way in WAYS if way in OF_ALL or name in OF_SOME],
    ids="".join,
)
def make_checker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: str
) -> Iterator[Callable[..., Checker]]:
    folder = tmp_path_factory.mktemp("model")
    architecture, way = request.param
    save_tiny_model(
        architecture, folder, torch.bfloat16 if way in (STORED_IN_HALF, COMPILED_IN_HALF) else torch.float32
    )
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    reference.to(device).eval()

    def make(kv_tokens: int = 512, block_size: int = 4) -> Checker:
        loaded = load_model(
            folder, device=device, dtype="float32", kv_tokens=kv_tokens, block_size=block_size, **WAYS[way]
        )
        return Checker(reference, loaded.runtime)

    return make


@pytest.fixture
def checker(make_checker: Callable[..., Checker]) -> Checker:
    return make_checker()


def test_whole_prefill(checker: Checker) -> None:
    checker.step((checker.open(), 5 * WINDOW, 5 * WINDOW))


def test_only_wanted_rows_come_back(checker: Checker) -> None:
    sequence = checker.open()
    checker.step((sequence, 9, 0))
    checker.step((sequence, 9, 1))


def test_chunked_prefill(checker: Checker) -> None:
    sequence = checker.open()
    for num_tokens in (1, 6, WINDOW, 13, 2):
        checker.step((sequence, num_tokens, num_tokens))


def test_decode_beyond_the_window(checker: Checker) -> None:
    sequence = checker.open()
    checker.step((sequence, 3, 1))
    for _ in range(3 * WINDOW):
        checker.step((sequence, 1, 1))


def test_verify_and_roll_back(checker: Checker) -> None:
    sequence = checker.open()
    checker.step((sequence, 10, 1))
    for num_accepted in (0, 3, 8, 1, 4):
        checker.step((sequence, 9, 9))
        checker.truncate(sequence, len(checker.tokens[sequence]) - 8 + num_accepted)
    checker.step((sequence, 1, 1))


def test_fork_goes_its_own_way(checker: Checker) -> None:
    trunk = checker.open()
    checker.step((trunk, 14, 1))
    branch = checker.fork(trunk)
    checker.step((branch, 5, 5))
    checker.step((trunk, 5, 5))
    checker.step((trunk, 1, 1), (branch, 1, 1))


def test_fork_cut_back_into_a_shared_block(checker: Checker) -> None:
    trunk = checker.open()
    checker.step((trunk, 16, 1))
    branch = checker.fork(trunk)
    checker.truncate(branch, 6)
    checker.step((branch, 3, 3))
    checker.step((trunk, 2, 2))


def test_everything_in_one_batch(checker: Checker) -> None:
    decoding, verifying, forked_from = checker.open(), checker.open(), checker.open()
    checker.step((decoding, 11, 1), (verifying, 3 * WINDOW, 0), (forked_from, 6, 2))
    branch = checker.fork(forked_from)
    checker.truncate(verifying, 2 * WINDOW)
    prefilling = checker.open()
    checker.step((prefilling, 17, 0), (decoding, 1, 1), (verifying, 5, 5), (branch, 2, 2), (forked_from, 1, 1))
    checker.step((decoding, 1, 1), (prefilling, 4, 1))


def test_scattered_blocks(make_checker: Callable[..., Checker]) -> None:
    checker = make_checker(kv_tokens=128, block_size=2)
    first, second = checker.open(), checker.open()
    for _ in range(11):
        checker.step((first, 5, 1), (second, 3, 3))
    checker.runtime.free(first)
    third = checker.open()
    checker.step((third, 70, 70), (second, 1, 1))
    blocks = checker.runtime._pool.blocks(third)
    assert blocks != sorted(blocks) or blocks[-1] - blocks[0] >= len(blocks), "the test must reach a scattered table"
    checker.step((third, 3, 3))
    checker.step((third, 1, 1))


def test_greedy_decoding_says_what_generate_says(checker: Checker) -> None:
    prompt = list(range(3, 14))
    expected = checker.reference.generate(
        torch.tensor([prompt], device=checker.reference.device), max_new_tokens=40, do_sample=False, eos_token_id=None
    )
    sequence, new_tokens, said = checker.runtime.open(), prompt, list(prompt)
    for _ in range(40):
        logits = checker.runtime.forward([Chunk(sequence, new_tokens, 1)])
        new_tokens = draw(logits, [SamplingRow(temperature=0)], [len(said)]).token_ids
        said += new_tokens
    assert said == expected[0].tolist()


def test_reference_is_sensitive_to_distant_tokens(make_checker: Callable[..., Checker]) -> None:
    """Guards the tests above: a reference whose logits hardly depend on the context would accept anything."""
    reference = make_checker().reference
    tokens = torch.arange(3, 3 + 2 * WINDOW, device=reference.device).unsqueeze(0)
    changed = tokens.clone()
    changed[0, -WINDOW] += 1
    with torch.inference_mode():
        difference = (reference(tokens).logits[0, -1] - reference(changed).logits[0, -1]).abs().max()
    assert difference > 100 * TOLERANCE
