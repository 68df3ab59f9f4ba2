"""The finish of the target: against greedy loops, and towards what a small draft can foresee."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from decode import repeated_ngrams
from distil import divergence
from evaluate import heldout_loss
from fast_decode import FastDecoder
from graphed import GraphedStep
from optimizer import Optimizers, Timebox
from pretrain import autocast, eager, logits_of, token_losses
from transformers import LlamaForCausalLM

Log = Callable[..., None]

# Temperature of each quarter of the rollouts.
ROLLOUT_TEMPERATURES = (0.0, 0.0, 0.8, 1.0)
NUM_PASSES = 2
MAX_SAY = 4.0  # the companion's greatest weight


@dataclass(frozen=True, slots=True)
class FinishSettings:
    """How the target is finished. Rollouts are of `length` tokens; a step sees `batch_tokens` of them and of corpus.

    Rows that repeat no more than `loops_allowed` of their 8-grams are not pushed: source code repeats itself too.
    `companion_weight` is where the companion's say begins; with a `loss_budget` it then follows the held-out loss.
    """

    length: int
    batch_tokens: int
    num_rollouts: int
    loops_allowed: float
    loops_weight: float
    anchor_weight: float
    companion_weight: float
    loss_budget: float | None
    tv_weight: float
    seed: int
    graphs: bool


@dataclass(slots=True)
class Finish:
    """The three models of a finish and the step that trains two of them. `model` has dropout in training mode.

    `divergence` says how far two models are apart, as `distil.divergence`.
    """

    model: LlamaForCausalLM
    anchor: LlamaForCausalLM
    companion: LlamaForCausalLM
    optimizers: Sequence[Optimizers]
    settings: FinishSettings
    divergence: Callable[..., torch.Tensor] = divergence

    def learn(
        self, corpus: torch.Tensor, own: torch.Tensor, loops: torch.Tensor, say: torch.Tensor, tv_weight: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """One step on rows of corpus and of the target's own text, [rows, length]; `loops` masks tokens to push off.

        `say` weighs the companion's pull on the target. Dropout is for the corpus alone: the companion has to follow
        the target as it decodes. Returns the losses.
        """
        with autocast(corpus.device):
            corpus_logits = logits_of(self.model.train(), corpus)
            own_logits = logits_of(self.model.eval(), own)
            guesses = torch.cat([logits_of(self.companion, ids) for ids in (corpus, own)]).flatten(0, 1).float()
            with torch.no_grad():
                before = logits_of(self.anchor, own)[:, :-1].float()
        logits = torch.cat([corpus_logits, own_logits]).flatten(0, 1).float()
        corpus_loss = token_losses(corpus_logits, corpus).mean()
        loops_loss = unlikelihood(token_losses(own_logits, own), loops[:, 1:])
        anchored = (kl(before, own_logits[:, :-1].float()) * ~loops[:, 1:]).mean()
        # The target heeds temperature 1 alone: at a low one it would be pulled into loops, which are easy to foresee.
        apart = self.divergence(logits, guesses.detach(), tv_weight, (1.0,))
        learning = self.divergence(logits.detach(), guesses, tv_weight)
        held = self.settings.loops_weight * loops_loss + self.settings.anchor_weight * anchored
        (corpus_loss + held + say * apart + learning).backward()
        for optimizers in self.optimizers:
            optimizers.step()
        return tuple(loss.detach() for loss in (corpus_loss, loops_loss, anchored, apart, learning))


def finish_target(
    finish: Finish,
    corpus_rows: torch.Tensor,
    held_out: torch.Tensor,
    prompts: Sequence[list[int]],
    timebox: Timebox,
    log: Log,
) -> None:
    """Make the target's greedy text worth reading and its choices easier to foresee.

    Each round decodes from training prompts. Each step then has four forces on the target: cross-entropy on the
    corpus; in its own text, unlikelihood of tokens that complete an 8-gram their row has held before, and KL to
    `anchor`, the target as it was, for all other tokens; and divergence from a companion, the draft to be, which
    learns from the target at the same time. Without the anchor the target and its companion agree on nonsense.

    `corpus_rows` must begin as prompts do, at a line's start. With rows that begin anywhere the target learns to tell
    the two apart by their first tokens: it writes nonsense after a prompt, and no loss on the corpus shows it.
    """
    settings = finish.settings
    rng = random.Random(settings.seed)
    rows = settings.batch_tokens // settings.length
    temperatures = torch.tensor(ROLLOUT_TEMPERATURES).repeat(settings.num_rollouts // len(ROLLOUT_TEMPERATURES))
    dtype = torch.bfloat16 if corpus_rows.is_cuda else torch.float32
    decoder = FastDecoder(finish.model, settings.num_rollouts, settings.length, dtype)
    step = GraphedStep(finish.learn, settings.graphs)
    weight = settings.companion_weight
    while timebox.progress < 1:
        decoder.refresh(finish.model)
        rollouts = decoder.decode(rng.sample(prompts, settings.num_rollouts), temperatures)
        repeated = repeated_ngrams(rollouts.ids) & rollouts.decoded()
        share = repeated.sum(1) / rollouts.decoded().sum(1)
        loops = repeated & (share > settings.loops_allowed)[:, None]
        order = torch.cat([torch.randperm(settings.num_rollouts) for _ in range(NUM_PASSES)]).to(corpus_rows.device)
        for chosen in order.split(rows):
            # The companion starts out knowing little, so it gains its say over the first quarter.
            say = weight * min(1.0, 4 * timebox.progress)
            tv_weight = settings.tv_weight * float(timebox.progress > 0.1)
            drawn = torch.randint(len(corpus_rows), (rows,), device=corpus_rows.device)
            finish.optimizers[0].set_rate(timebox.rate_factor())
            finish.optimizers[1].set_rate(1.0)
            own = rollouts.ids[chosen]
            losses = step(corpus_rows[drawn], own, loops[chosen], *torch.tensor([say, tv_weight], device=own.device))
            timebox.advance()
            if timebox.progress >= 1:
                break
        with eager(finish.model), autocast(held_out.device):
            found = heldout_loss(finish.model, held_out)
        names = ("corpus_loss", "unlikelihood", "anchor_kl", "companion_apart", "companion_loss")
        log(
            "finish",
            step=timebox.num_steps,
            elapsed_s=round(timebox.elapsed_s, 1),
            repeated_8grams_greedy=round(float(share[temperatures == 0].mean()), 4),
            heldout_loss=round(found, 4),
            companion_weight=round(weight, 4),
            **{name: round(float(loss), 4) for name, loss in zip(names, losses, strict=True)},
        )

        if settings.loss_budget is not None:
            weight = steer(weight, settings.loss_budget - found, timebox.progress)


def steer(weight: float, room: float, progress: float) -> float:
    """The companion's next weight, given the nats of the budget that are left; the fall of the rate gives some back."""
    change = min(2.0, max(0.5, math.exp(10.0 * (room + 0.1 * (1.0 - progress)))))
    return min(MAX_SAY, max(0.01, weight * change))


def unlikelihood(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """-log(1 - p) of the masked tokens, from their cross-entropies, as a mean over all tokens (Welleck et al. 2020)."""
    chosen = (-losses).exp().clamp(max=1 - 1e-4)
    return -(torch.log1p(-chosen) * mask).sum() / mask.numel()


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p, q) of every token."""
    p, q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    return (p.exp() * (p - q)).sum(-1)
