"""The benchmark's dial: real models whose agreement is what was asked for."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from outrider.bench.synthetic_pair import SyntheticPair


def tiny_pair() -> SyntheticPair:
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return SyntheticPair(config, num_draft_layers=2, temperature=0.8)


def test_without_the_tail_the_draft_is_the_target() -> None:
    pair = tiny_pair()
    pair.set_epsilon(0.0)
    assert pair.agreement(pair.random_text()) == 1.0


def test_the_acceptance_is_a_dial() -> None:
    pair = tiny_pair()
    found = [pair.turn_to(wanted) for wanted in (0.4, 0.7, 0.9)]
    assert found == sorted(found)
    assert all(abs(rate - wanted) < 0.12 for rate, wanted in zip(found, (0.4, 0.7, 0.9), strict=True)), found


def test_the_own_text_is_what_the_target_draws() -> None:
    pair = tiny_pair()
    pair.turn_to(0.5)
    text = pair.own_text()
    with torch.inference_mode():
        draws = pair._draws(pair.target(input_ids=text, use_cache=False).logits)
    assert (draws[:, 7:-1] == text[:, 8:]).float().mean() > 0.99  # a cache computes in another order
