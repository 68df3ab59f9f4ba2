"""How many drafted tokens each method keeps, on the demo pair: the tables of docs/exactness.md.

python models/acceptance.py --json docs/acceptance.json

The target says a continuation of every held-out prompt by itself. Behind every token of it the draft model drafts K
tokens in each of three ways (from q, with the target's noise, its best ones), the target runs them in one forward, and
every method says how many it keeps. Drawing and deciding are the functions that the workers use.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from transformers import AutoTokenizer

from inference import (
    Chunk,
    SamplingRow,
    SequenceId,
    draw,
    load_model,
    pick,
    truncated_weights,
    warped,
)
from speculation.draft_distribution import WEIGHT_BITS, WEIGHT_TOTAL, DraftDistribution, one_hot
from speculation.fingerprint import fingerprint
from speculation.messages import Method
from target_worker.ratio_verification import Judged, verify_by_ratio

SETTINGS = {"0": (0.0, 1.0), "0.5": (0.5, 1.0), "0.8, top-p 0.9": (0.8, 0.9), "1.0": (1.0, 1.0), "1.3": (1.3, 1.0)}
METHODS = ("coupled", "rejection", "block", "one-hot", "matching")
TOP_NS = (1, 4, 16, 64, 256)


@dataclass
class Row:
    """One prompt and the target's own continuation of it, in both caches."""

    token_ids: list[int]
    seed: int
    target: SequenceId
    draft: SequenceId


@dataclass
class Tally:
    """Of one temperature: a number per place and method."""

    kept: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in METHODS})
    single: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METHODS if name != "block"})
    by_top_n: dict[int, list[float]] = field(default_factory=lambda: {top_n: [] for top_n in TOP_NS})
    bytes_by_top_n: dict[int, list[int]] = field(default_factory=lambda: {top_n: [] for top_n in TOP_NS})


class Pair:
    """Both models, and how one temperature is measured."""

    def __init__(self, folder: Path, num_rows: int, max_length: int, eos: int, k: int, top_n: int) -> None:
        kv_tokens = num_rows * (max_length + k + 32)
        self.target, self.draft = (
            load_model(folder / name, device="cpu", kv_tokens=kv_tokens, num_threads=None).runtime
            for name in ("target", "draft")
        )
        self.eos, self.k, self.top_n = eos, k, top_n

    def measure(self, prompts: Sequence[Sequence[int]], setting: tuple[float, float], num_tokens: int) -> Tally:
        """Runs every prompt ``num_tokens`` further, or to its end, and drafts at every place."""
        self.sampling = SamplingRow(setting[0], top_p=setting[1])
        tally = Tally()
        rows = [
            Row(list(prompt), 1_000_003 * index + 17, self.target.open(), self.draft.open())
            for index, prompt in enumerate(prompts)
        ]
        self._prefill(rows)
        going_on = rows
        for _ in range(num_tokens):
            self._one_place(going_on, tally)
            going_on = [row for row in going_on if row.token_ids[-1] != self.eos]
        for row in rows:
            self.target.free(row.target)
            self.draft.free(row.draft)
        return tally

    def _prefill(self, rows: Sequence[Row]) -> None:
        for row in rows:  # all but the last token, which is run at every place together with drafts
            for runtime, sequence in ((self.target, row.target), (self.draft, row.draft)):
                runtime.forward([Chunk(sequence, row.token_ids[:-1], 0)])

    def _one_place(self, rows: Sequence[Row], tally: Tally) -> None:
        settings = [replace(self.sampling, seed=row.seed) for row in rows]
        by_noise, _ = self._chains(rows, lambda logits, depth: (self._draws(logits, rows, settings, depth), None))
        draws, logits = self._verify(rows, settings, by_noise)
        tally.kept["coupled"] += map(_num_equal, by_noise, draws)
        tally.single["coupled"] += [float(chain[0] == own[0]) for chain, own in zip(by_noise, draws, strict=True)]
        if self.sampling.is_greedy:
            for name in METHODS[1:]:
                tally.kept[name] += tally.kept["coupled"][-len(rows) :]
                if name in tally.single:
                    tally.single[name] += tally.single["coupled"][-len(rows) :]
        else:
            self._ratios(rows, settings, logits, tally)
        for row, own in zip(rows, draws, strict=True):  # the first draw is plain decoding's next token
            row.token_ids.append(own[0])

    def _ratios(self, rows: Sequence[Row], settings: Sequence[SamplingRow], logits: list[Tensor], tally: Tally) -> None:
        from_q, qs = self._chains(rows, lambda scores, depth: self._from_q(scores, rows, depth))
        draws, logits = self._verify(rows, settings, from_q)
        tally.kept["matching"] += map(_num_equal, from_q, draws)
        for method in (Method.REJECTION, Method.BLOCK):
            tally.kept[method.value] += self._judge(method, rows, settings, logits, from_q, qs)
        best, _ = self._chains(rows, lambda scores, depth: (scores.argmax(-1).tolist(), None))
        hots = [[one_hot(token) for token in chain] for chain in best]
        _, best_logits = self._verify(rows, settings, best)
        tally.kept["one-hot"] += self._judge(Method.REJECTION, rows, settings, best_logits, best, hots)
        self._singles(rows, logits, tally)

    def _singles(self, rows: Sequence[Row], logits: list[Tensor], tally: Tally) -> None:
        """Exact chances of one token: no draw is needed to know them."""
        p = warped(torch.stack([part[0] for part in logits]), [self.sampling] * len(rows)).double().softmax(-1)
        scores = warped(self._first_draft_logits, [self.sampling] * len(rows))
        for top_n in TOP_NS:
            token_ids, weights = truncated_weights(scores, top_n, WEIGHT_BITS)
            q = weights.double() / WEIGHT_TOTAL
            at = p.gather(1, token_ids)
            tally.by_top_n[top_n] += torch.minimum(at, q).sum(-1).tolist()
            pairs = zip(token_ids.tolist(), weights.tolist(), strict=True)
            tally.bytes_by_top_n[top_n] += [_distribution(*pair).num_bytes for pair in pairs]
            if top_n == self.top_n:
                tally.single["rejection"] += torch.minimum(at, q).sum(-1).tolist()
                tally.single["matching"] += (at * q).sum(-1).tolist()
            if top_n == 1:
                tally.single["one-hot"] += at[:, 0].tolist()

    def _chains(
        self, rows: Sequence[Row], draft: Callable[[Tensor, int], tuple[list[int], list[DraftDistribution] | None]]
    ) -> tuple[list[list[int]], list[list[DraftDistribution]]]:
        """K drafted tokens behind each row, and what each was drawn from."""
        lengths = [self.draft.length(row.draft) for row in rows]
        chains: list[list[int]] = [[] for _ in rows]
        qs: list[list[DraftDistribution]] = [[] for _ in rows]
        for depth in range(self.k):
            uncached = [
                row.token_ids[length:] if not depth else chain[-1:]
                for row, length, chain in zip(rows, lengths, chains, strict=True)
            ]
            logits = self.draft.forward([Chunk(row.draft, new, 1) for row, new in zip(rows, uncached, strict=True)])
            if not depth:
                self._first_draft_logits = logits.clone()
            tokens, distributions = draft(logits, depth)
            for index, token in enumerate(tokens):
                chains[index].append(token)
                if distributions is not None:
                    qs[index].append(distributions[index])
        for row, length in zip(rows, lengths, strict=True):
            self.draft.truncate(row.draft, length)
        return chains, qs

    def _draws(self, logits: Tensor, rows: Sequence[Row], settings: Sequence[SamplingRow], depth: int) -> list[int]:
        return draw(logits, settings, [len(row.token_ids) + depth for row in rows]).token_ids

    def _from_q(self, logits: Tensor, rows: Sequence[Row], depth: int) -> tuple[list[int], list[DraftDistribution]]:
        scores = warped(logits, [self.sampling] * len(rows))
        token_ids, weights = truncated_weights(scores, self.top_n, WEIGHT_BITS)
        seeds = [row.seed ^ fingerprint([len(row.token_ids), depth]) for row in rows]
        columns = pick(weights, seeds, [len(row.token_ids) + depth for row in rows], WEIGHT_BITS)
        tokens = token_ids.gather(1, columns.unsqueeze(1)).squeeze(1).tolist()
        return tokens, [_distribution(*pair) for pair in zip(token_ids.tolist(), weights.tolist(), strict=True)]

    def _verify(
        self, rows: Sequence[Row], settings: Sequence[SamplingRow], chains: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[Tensor]]:
        """The target's own draws and logits at the K + 1 places of every chain."""
        lengths = [self.target.length(row.target) for row in rows]
        chunks = [
            Chunk(row.target, [*row.token_ids[length:], *chain], self.k + 1)
            for row, length, chain in zip(rows, lengths, chains, strict=True)
        ]
        logits = self.target.forward(chunks).clone()
        for row, length in zip(rows, lengths, strict=True):
            self.target.truncate(row.target, length)
        places = [len(row.token_ids) + depth for row in rows for depth in range(self.k + 1)]
        draws = draw(logits, [one for one in settings for _ in range(self.k + 1)], places).token_ids
        width = self.k + 1
        return [draws[start : start + width] for start in range(0, len(draws), width)], list(logits.split(width))

    def _judge(
        self,
        method: Method,
        rows: Sequence[Row],
        settings: Sequence[SamplingRow],
        logits: Sequence[Tensor],
        chains: Sequence[Sequence[int]],
        qs: Sequence[Sequence[DraftDistribution]],
    ) -> list[int]:
        judged = [
            Judged(method, [one] * (self.k + 1), len(row.token_ids), self.k, list(zip(chain, q, strict=True)))
            for one, row, chain, q in zip(settings, rows, chains, qs, strict=True)
        ]
        kept = verify_by_ratio(torch.cat(list(logits)), judged, self.target.vocab_size)
        return [len(tokens) - 1 for tokens in kept]


def _num_equal(chain: Sequence[int], draws: Sequence[int]) -> int:
    count = 0
    while count < len(chain) and chain[count] == draws[count]:
        count += 1
    return count


def _distribution(token_ids: Sequence[int], weights: Sequence[int]) -> DraftDistribution:
    kept = [index for index, weight in enumerate(weights) if weight]
    return DraftDistribution(tuple(token_ids[index] for index in kept), tuple(weights[index] for index in kept))


def figures(tally: Tally, k: int) -> dict[str, object]:
    """Means and standard errors; places of one text are not independent, which the errors do not know."""

    def figure(values: Sequence[float], digits: int = 3) -> dict[str, float]:
        return {"mean": round(mean(values), digits), "error": round(stdev(values) / len(values) ** 0.5, 4)}

    found: dict[str, object] = {
        "num_places": len(tally.kept["coupled"]),
        "chance_of_one": {name: figure(values) for name, values in tally.single.items()},
        "kept_of_k": {name: figure(values) for name, values in tally.kept.items()},
        "share_kept": {name: figure([value / k for value in values]) for name, values in tally.kept.items()},
    }
    if tally.by_top_n[1]:
        found["by_top_n"] = {
            str(top_n): {"chance_of_one": figure(values), "bytes": round(mean(tally.bytes_by_top_n[top_n]), 1)}
            for top_n, values in tally.by_top_n.items()
        }
    return found


def table(title: str, results: dict[str, dict[str, dict[str, dict[str, float]]]], key: str, methods: object) -> str:
    names = list(methods)  # type: ignore[call-overload]
    lines = [title, "", "| temperature | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, found in results.items():
        cells = " | ".join(f"{found[key][method]['mean']:.2f}" for method in names)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what every verification method keeps.")
    parser.add_argument("--models", type=Path, default=Path(__file__).parent, help="folder with target/ and draft/")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--num-prompt-tokens", type=int, default=96, help="the last so many of each prompt")
    parser.add_argument("--num-tokens", type=int, default=32, help="places behind each prompt")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--top-n", type=int, default=64, choices=TOP_NS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.models / "target")
    texts = json.loads((args.models / "heldout_prompts.json").read_text())["prompts"][: args.num_prompts]
    prompts = [tokenizer(text).input_ids[-args.num_prompt_tokens :] for text in texts]
    max_length = args.num_prompt_tokens + args.num_tokens
    pair = Pair(args.models, len(prompts), max_length, tokenizer.eos_token_id, args.k, args.top_n)
    results = {}
    for name, setting in SETTINGS.items():
        results[name] = figures(pair.measure(prompts, setting, args.num_tokens), args.k)
        print(json.dumps({name: results[name]}))
    print(
        table("chance that one drafted token is kept", results, "chance_of_one", [m for m in METHODS if m != "block"])
    )
    print(table(f"tokens kept of {args.k} drafted", results, "kept_of_k", METHODS))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "models")}
        args.json.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
