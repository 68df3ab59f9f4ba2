"""Models small enough to check everything against a full forward: random weights, a trained byte-level tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 280
EOS_TOKEN = "<|endoftext|>"


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE of exactly `VOCAB_SIZE` entries; id 0 is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\nfor i in range(10):\n    print(fib(i))\n"
    tokenizer.train_from_iterator([text * 3], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def tiny_llama(seed: int, num_layers: int = 2, max_context: int = 256, sharpness: float = 6.0) -> LlamaForCausalLM:
    """Random weights; ``sharpness`` spreads the logits, so that sampling is neither flat nor certain."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_context,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness * 8)
    return model


def with_quiet_tail(model: LlamaForCausalLM, num_loud: int, scale: float) -> LlamaForCausalLM:
    """Scales down what the layers behind the first ``num_loud`` add: they cost as much and change little."""
    with torch.no_grad():
        for layer in model.model.layers[num_loud:]:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def first_layers(model: LlamaForCausalLM, num_layers: int) -> LlamaForCausalLM:
    """A drafter: the same model cut off behind its first layers."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    draft = LlamaForCausalLM(config).eval()
    draft.load_state_dict(model.state_dict(), strict=False)
    return draft


def perturbed(model: LlamaForCausalLM, amount: float, seed: int = 1) -> LlamaForCausalLM:
    """A copy whose weights are off by ``amount`` of their own size: a drafter that agrees more or less."""
    other = LlamaForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * amount)
    return other


def save(model: LlamaForCausalLM, folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    """Writes model and tokenizer as ``from_pretrained`` reads them."""
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or byte_level_tokenizer(), eos_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    )
    wrapped.save_pretrained(folder)
    return folder
