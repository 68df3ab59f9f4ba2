"""Measures of the demo pair on held-out files. Run as a script it measures the pair in a folder:

python models/evaluate.py --models models
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from decode import Rows, decode, repeated_ngrams, warp
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

NUM_NEW_TOKENS = 256


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, rows: torch.Tensor, chunk: int = 8) -> float:
    """Mean cross-entropy in nats per token over rows [count, length]."""
    losses = []
    for part in rows.split(chunk):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).double() * len(part))
    return float(torch.stack(losses).sum()) / len(rows)


@torch.no_grad()
def agreement(
    draft: LlamaForCausalLM, rows: Rows, mask: torch.Tensor, temperature: float = 0.0, top_p: float = 1.0
) -> float:
    """Share of the masked tokens of the target's text that the draft would have proposed.

    At temperature 0 that is the draft's argmax; above, its draw with the very noise that the target drew with.
    """
    num_agreed = 0
    for index, ids in enumerate(rows.ids.split(1)):
        scores = draft(input_ids=ids, use_cache=False).logits[0, :-1].float()
        if rows.noise is not None:
            scores = warp(scores, temperature, top_p)
            scores[-rows.noise.shape[1] :] += rows.noise[index]
        num_agreed += int((scores.argmax(-1) == ids[0, 1:])[mask[index, 1:]].sum())
    return num_agreed / int(mask.sum())


def repetition(rows: Rows, mask: torch.Tensor) -> float:
    """Share of the masked tokens that complete an 8-gram seen before in their row, prompt included."""
    return float(repeated_ngrams(rows.ids)[mask].float().mean())


def measure(
    target: LlamaForCausalLM,
    drafts: Sequence[LlamaForCausalLM],
    prompts: Sequence[Sequence[int]],
    eos: int,
    num_new: int = NUM_NEW_TOKENS,
) -> tuple[dict[str, object], Rows]:
    """Repetition of the target's greedy text, and each draft's agreement along the target's own text, up to EOS."""
    length = max(map(len, prompts)) + num_new
    greedy = decode(target, prompts, length)
    mask = greedy.decoded(eos, num_new)
    report: dict[str, object] = {
        "repeated_8grams": round(repetition(greedy, mask), 4),
        "greedy_tokens": int(mask.sum()),
        "greedy": [round(agreement(draft, greedy, mask), 4) for draft in drafts],
    }
    for name, temperature, top_p in [("t0.8_p0.9", 0.8, 0.9), ("t0.8", 0.8, 1.0), ("t1.0", 1.0, 1.0)] if drafts else []:
        rows = decode(target, prompts, length, temperature, top_p, seed=1, keep_noise=True)
        mask = rows.decoded(eos, num_new)
        report[name] = [round(agreement(draft, rows, mask, temperature, top_p), 4) for draft in drafts]
    return report, greedy


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo pair on its held-out prompts.")
    parser.add_argument("--models", type=Path, default=Path(__file__).parent, help="folder with target/ and draft/")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--num-new-tokens", type=int, default=NUM_NEW_TOKENS)
    parser.add_argument("--samples", type=int, default=2, help="greedy continuations to print")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.models / "target")
    target, draft = (
        AutoModelForCausalLM.from_pretrained(args.models / name, dtype=torch.float32) for name in ("target", "draft")
    )
    texts = json.loads((args.models / "heldout_prompts.json").read_text())["prompts"][: args.num_prompts]
    prompts = [tokenizer(text).input_ids for text in texts]
    report, greedy = measure(target, [draft], prompts, tokenizer.eos_token_id, args.num_new_tokens)
    print(json.dumps(report, indent=2))
    for row, start in list(zip(greedy.ids, greedy.starts, strict=True))[: args.samples]:
        print("-" * 40 + f"\n{tokenizer.decode(row[:start])}<<<HERE>>>{tokenizer.decode(row[start:])}")


if __name__ == "__main__":
    main()
