"""Decoding many prompts of unequal length at once, and measures of what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Rows:
    """Decoded sequences. `ids` [rows, length]; row r is prompt up to `starts[r]`, decoded from there on.

    `noise` [rows, n, vocabulary], where it was kept, is the Gumbel noise of the last n positions.
    """

    ids: torch.Tensor
    starts: torch.Tensor
    noise: torch.Tensor | None = None

    def decoded(self, eos: int | None = None, num_new: int | None = None) -> torch.Tensor:
        """Mask [rows, length] of decoded tokens; with `eos` up to and with the first EOS, with `num_new` no more."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        mask = positions >= self.starts[:, None]
        if num_new is not None:
            mask &= positions < self.starts[:, None] + num_new
        if eos is not None:
            is_eos = (self.ids == eos) & mask
            mask &= is_eos.cumsum(1) - is_eos.long() == 0
        return mask


def warp(logits: torch.Tensor, temperature: torch.Tensor | float, top_p: float = 1.0) -> torch.Tensor:
    """Log-probabilities after temperature and nucleus truncation; temperature is a number or [rows, 1]."""
    logps = torch.log_softmax(logits.float() / temperature, -1)
    if top_p < 1.0:
        ordered, order = logps.sort(-1, descending=True)
        probs = ordered.exp()
        dropped = probs.cumsum(-1) - probs >= top_p
        logps = logps.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))
    return logps


def gumbel_like(logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Standard Gumbel noise; adding it to log-probabilities and taking the argmax draws a sample."""
    uniform = torch.rand(logits.shape, device=logits.device, generator=generator).clamp_(1e-20, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


def pad_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as [rows, longest] padded with 0 on the right, and their lengths."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return padded.to(device), lengths.to(device)


@torch.no_grad()
def decode(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    length: int,
    temperature: torch.Tensor | float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    num_warm: int = 0,
    keep_noise: bool = False,
) -> Rows:
    """Continue every prompt to `length` tokens in all; EOS does not stop a row.

    No padding reaches the model: all rows are prefilled up to the shortest prompt, and a longer prompt's tokens are
    then fed one by one in place of decoded ones. Temperature is one number or one per row; 0 is greedy. The first
    `num_warm` decoded tokens of every row are drawn at temperature 1 instead, for variety.
    """
    device = model.device
    padded, starts = pad_prompts(prompts, device)
    temperature = torch.as_tensor(temperature, device=device, dtype=torch.float).expand(len(prompts))[:, None]
    generator = torch.Generator(device).manual_seed(seed)
    cache = DynamicCache()
    ids = torch.zeros(len(prompts), length, dtype=torch.long, device=device)
    shortest, longest = int(starts.min()), padded.shape[1]
    ids[:, :longest] = padded
    fed = ids[:, :shortest]
    kept: list[torch.Tensor] = []
    for position in range(shortest, length):
        hidden = model.model(input_ids=fed, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        logits = model.lm_head(hidden)
        heat = torch.where(position < (starts + num_warm)[:, None], 1.0, temperature)
        drawn = logits.argmax(-1)
        if bool((heat > 0).any()):
            logps = warp(logits, heat.clamp(min=1e-4), top_p)
            noise = gumbel_like(logps, generator)
            drawn = torch.where(heat[:, 0] > 0, (logps + noise).argmax(-1), drawn)
            if keep_noise:
                kept.append(noise)
        ids[:, position] = torch.where(position < starts, ids[:, position], drawn)
        fed = ids[:, position : position + 1]
    return Rows(ids, starts, torch.stack(kept, 1) if kept else None)


def repeated_ngrams(ids: torch.Tensor, n: int = 8) -> torch.Tensor:
    """Mask [rows, length] of the tokens that complete an n-gram which the row has held before."""
    hashes = torch.zeros_like(ids[:, n - 1 :])
    for offset in range(n):
        hashes = hashes * 1_000_003 + ids[:, offset : ids.shape[1] - n + 1 + offset] + 1
    ordered, order = hashes.sort(dim=1, stable=True)
    seen = torch.zeros_like(ordered, dtype=torch.bool)
    seen[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, n - 1 :] = torch.zeros_like(seen).scatter(1, order, seen)
    return mask
