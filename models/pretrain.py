"""Training the target: next-token prediction on the corpus, then a short finish against greedy loops."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from corpus import batches
from decode import repeated_ngrams
from evaluate import heldout_loss
from fast_decode import FastDecoder
from optimizer import Optimizers, Timebox
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

Log = Callable[..., None]


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 where the hardware has it, nothing on the CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def eager(model: LlamaForCausalLM) -> Iterator[LlamaForCausalLM]:
    """The model in evaluation mode and uncompiled, for shapes that training does not have."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        yield model
    model.train()


def add_dropout(model: LlamaForCausalLM, share: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Dropout on each residual branch and on the embedding; transformers' Llama has it on attention weights only."""

    def drop(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, share, training=module.training)

    branches = [branch for layer in model.model.layers for branch in (layer.self_attn.o_proj, layer.mlp)]
    return [module.register_forward_hook(drop) for module in [model.model.embed_tokens, *branches]]


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token but the first, [rows, length - 1], fp32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def train_target(
    model: LlamaForCausalLM,
    train_ids: torch.Tensor,
    held_out: torch.Tensor,
    optimizers: Optimizers,
    timebox: Timebox,
    lengths: Sequence[int],
    batch_tokens: int,
    seed: int,
    log: Log,
    eval_every_s: float = 20.0,
) -> None:
    """Train until the timebox is spent, on rows of each of `lengths` in turn: short ones teach cold starts."""
    streams = [batches(train_ids, length, batch_tokens // length, seed + length) for length in lengths]
    model.train()
    last_eval_s = 0.0
    running: list[torch.Tensor] = []
    while timebox.progress < 1:
        ids = next(streams[timebox.num_steps % len(streams)])
        with autocast(ids.device):
            loss = token_losses(model, ids).mean()
        loss.backward()
        optimizers.step(timebox.rate_factor())
        timebox.advance()
        running.append(loss.detach())
        if timebox.elapsed_s - last_eval_s > eval_every_s or timebox.progress >= 1:
            last_eval_s = timebox.elapsed_s
            train_loss = float(torch.stack(running[-100:]).mean())
            with eager(model), autocast(ids.device):
                found = heldout_loss(model, held_out)
            log(
                "target",
                step=timebox.num_steps,
                elapsed_s=round(timebox.elapsed_s, 1),
                epochs=round(timebox.num_steps * batch_tokens / len(train_ids), 2),
                train_loss=round(train_loss, 4),
                heldout_loss=round(found, 4),
            )


@dataclass(frozen=True, slots=True)
class FinishSettings:
    """How the target is finished. Rollouts are of `length` tokens; a step sees `batch_tokens` of them and of corpus.

    Rows that repeat no more than `loops_allowed` of their 8-grams are not pushed: source code repeats itself too.
    """

    length: int
    batch_tokens: int
    num_rollouts: int
    loops_allowed: float
    loops_weight: float
    anchor_weight: float
    companion_weight: float
    seed: int


def unlikelihood(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """-log(1 - p) of the masked tokens, from their cross-entropies, as a mean over all tokens (Welleck et al. 2020)."""
    chosen = (-losses).exp().clamp(max=1 - 1e-4)
    return -(torch.log1p(-chosen) * mask).sum() / mask.numel()


def finish_target(
    model: LlamaForCausalLM,
    anchor: LlamaForCausalLM,
    companion: LlamaForCausalLM,
    corpus_rows: torch.Tensor,
    prompts: Sequence[list[int]],
    optimizers: Sequence[Optimizers],
    timebox: Timebox,
    settings: FinishSettings,
    log: Log,
) -> None:
    """Make the target's greedy text worth reading and its choices easier to foresee.

    Each round decodes greedily from training prompts. Each step then has four forces on the target: cross-entropy on
    the corpus; in its own text, unlikelihood of tokens that complete an 8-gram their row has held before, and KL to
    `anchor`, the target as it was, for all other tokens; and KL to a companion, the draft to be, which learns from
    the target's logits at the same time. Without the anchor the target and its companion agree on nonsense.

    `corpus_rows` must begin as prompts do, at a line's start. With rows that begin anywhere the target learns to tell
    the two apart by their first tokens: it writes nonsense after a prompt, and no loss on the corpus shows it.
    """
    rng = random.Random(settings.seed)
    rows = settings.batch_tokens // settings.length
    dtype = torch.bfloat16 if corpus_rows.is_cuda else torch.float32
    decoder = FastDecoder(model, settings.num_rollouts, settings.length, dtype)
    mine, companions = optimizers
    while timebox.progress < 1:
        decoder.refresh(model)
        rollouts = decoder.decode(rng.sample(prompts, settings.num_rollouts), 0.0)
        repeated = repeated_ngrams(rollouts.ids) & rollouts.decoded()
        share = repeated.sum(1) / rollouts.decoded().sum(1)
        repeated &= (share > settings.loops_allowed)[:, None]
        for own, mask in zip(rollouts.ids.split(rows), repeated.split(rows), strict=True):
            chosen = torch.randint(len(corpus_rows), (len(own),), device=own.device)
            ids = torch.cat([corpus_rows[chosen], own])
            with autocast(ids.device):
                logits = torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(rows)]).float()
                guesses = companion(input_ids=ids, use_cache=False).logits.float()
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            corpus_loss, loops_loss = losses[: len(own)].mean(), unlikelihood(losses[len(own) :], mask[:, 1:])
            with torch.no_grad(), autocast(ids.device):
                before = anchor(input_ids=own, use_cache=False).logits[:, :-1].float()
            anchored = (kl(before, logits[len(own) :, :-1]) * ~mask[:, 1:]).mean()
            apart = kl(logits, guesses.detach()).mean()
            learning = kl(logits.detach(), guesses).mean()
            # The companion starts out knowing little, so it gains its say over the first half.
            say = settings.companion_weight * min(1.0, 2 * timebox.progress)
            held = settings.loops_weight * loops_loss + settings.anchor_weight * anchored
            (corpus_loss + held + say * apart + learning).backward()
            mine.step(timebox.rate_factor())
            companions.step(1.0)
            timebox.advance()
            if timebox.progress >= 1:
                break
        log(
            "finish",
            step=timebox.num_steps,
            elapsed_s=round(timebox.elapsed_s, 1),
            repeated_8grams=round(float(share.mean()), 4),
            corpus_loss=round(float(corpus_loss.detach()), 4),
            unlikelihood=round(float(loops_loss.detach()), 4),
            anchor_kl=round(float(anchored.detach()), 4),
            companion_kl=round(float(apart.detach()), 4),
        )


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p, q) of every token."""
    p, q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    return (p.exp() * (p - q)).sum(-1)
