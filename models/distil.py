"""Distilling a draft from the target, on the corpus and on many of the target's own continuations."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from fast_decode import FastDecoder
from graphed import GraphedStep
from optimizer import Optimizers, Timebox
from pretrain import autocast, logits_of
from torch.nn import functional as F
from transformers import LlamaForCausalLM

Log = Callable[..., None]

# Temperature of each eighth of the sampled rows. Greedy text matters most, and it is what a draft can learn best.
ROW_TEMPERATURES = (0.0, 0.0, 0.0, 0.5, 0.8, 0.8, 1.0, 1.0)
NUM_WARM_TOKENS = 48


@dataclass(slots=True)
class Lessons:
    """Rows of ids [rows, length] with the target's last hidden states [rows, length, hidden], fp16.

    Logits are one product away from hidden states and ten times as large, so the states are what is kept.
    """

    ids: torch.Tensor
    states: torch.Tensor

    def batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(self.ids), (rows,), device=self.ids.device)
        return self.ids[chosen], self.states[chosen]


@torch.no_grad()
def make_lessons(target: LlamaForCausalLM, ids: torch.Tensor, chunk_tokens: int = 32768) -> Lessons:
    """The target's states along rows of ids, in fp32 (TF32 on CUDA) as decoding will have them."""
    chunk = max(1, chunk_tokens // ids.shape[1])
    states = [target.model(input_ids=part, use_cache=False).last_hidden_state.half() for part in ids.split(chunk)]
    return Lessons(ids, torch.cat(states))


def sample_continuations(
    target: LlamaForCausalLM, prompts: Sequence[list[int]], length: int, rows: int, minutes: float, seed: int, log: Log
) -> torch.Tensor:
    """As many rows of the target's own text as fit in the time, at least one batch. Shape [rows, length].

    In every second batch the first decoded tokens are drawn at temperature 1: prompts come from files that the target
    has seen, and a drawn beginning leads it away from what it remembers.
    """
    rng = random.Random(seed)
    temperatures = torch.tensor(ROW_TEMPERATURES).repeat(rows // len(ROW_TEMPERATURES) + 1)[:rows]
    decoder = FastDecoder(target, rows, length, torch.bfloat16 if target.device.type == "cuda" else torch.float32)
    timebox = Timebox(minutes, max_steps=10_000, num_warmup=0)
    found: list[torch.Tensor] = []
    while not found or timebox.elapsed_s < timebox.limit_s:
        num_warm = NUM_WARM_TOKENS * (len(found) % 2)
        found.append(decoder.decode(rng.choices(prompts, k=rows), temperatures, num_warm).ids)
        log("samples", rows=rows * len(found), tokens=rows * length * len(found), elapsed_s=round(timebox.elapsed_s, 1))
    return torch.cat(found)


def start_from_target(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> None:
    """Give the draft the target's embedding, final norm and first layers, as far as shapes agree."""
    source = target.state_dict()
    with torch.no_grad():
        for name, param in draft.state_dict().items():
            if name in source and source[name].shape == param.shape:
                param.copy_(source[name])


def divergence(
    teacher: torch.Tensor, student: torch.Tensor, tv_weight: torch.Tensor, sharpnesses: Sequence[float] = (1.0, 3.0)
) -> torch.Tensor:
    """KL(target, draft) and weighted total variation, at temperatures 1 and 1/3. Logits [tokens, vocabulary].

    Total variation is the probability that the best coupling of two draws differs: one minus the acceptance rate. The
    low temperature stands for greedy decoding.
    """
    loss = torch.zeros((), device=teacher.device)
    for sharpness in sharpnesses:
        p, q = torch.log_softmax(teacher * sharpness, -1), torch.log_softmax(student * sharpness, -1)
        kl = (p.exp() * (p - q)).sum(-1)
        tv = 0.5 * (p.exp() - q.exp()).abs().sum(-1)
        loss = loss + (kl + tv_weight * tv).mean()
    return loss


@dataclass(slots=True)
class Student:
    """A draft in training. The target's embedding gives the teacher's logits from its states."""

    model: LlamaForCausalLM
    optimizers: Optimizers
    tv_weight: float
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = divergence

    def learn(self, ids: torch.Tensor, teacher: torch.Tensor, with_tv: torch.Tensor) -> torch.Tensor:
        """One step on rows of ids. Total variation counts where `with_tv` is 1 and not where it is 0."""
        with autocast(ids.device):
            logits = logits_of(self.model, ids)
        loss = self.loss(teacher.flatten(0, 1), logits.flatten(0, 1).float(), with_tv * self.tv_weight)
        loss.backward()
        self.optimizers.step()
        return loss.detach()


def distil(
    target: LlamaForCausalLM,
    students: Sequence[Student],
    lessons: Sequence[tuple[Lessons, int]],
    batch_tokens: int,
    timebox: Timebox,
    log: Log,
    graphs: bool,
    log_every_s: float = 15.0,
) -> None:
    """Train all students on the same batches until the timebox is spent; `lessons` come with their relative shares."""
    embedding = target.lm_head.weight.detach()

    def learn(ids: torch.Tensor, states: torch.Tensor, with_tv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        teacher = F.linear(states.float(), embedding)
        return tuple(student.learn(ids, teacher, with_tv) for student in students)

    schedule = [(lesson, step) for lesson, share in lessons for step in [GraphedStep(learn, graphs)] * share]
    last_log_s = 0.0
    while timebox.progress < 1:
        lesson, step = schedule[timebox.num_steps % len(schedule)]
        ids, states = lesson.batch(batch_tokens // lesson.ids.shape[1])
        for student in students:
            student.optimizers.set_rate(timebox.rate_factor(0.4))
        # Total variation has no gradient where the draft is sure and wrong, so KL leads alone at first.
        losses = step(ids, states, torch.tensor(float(timebox.progress > 0.25), device=ids.device))
        timebox.advance()
        if timebox.elapsed_s - last_log_s > log_every_s or timebox.progress >= 1:
            last_log_s = timebox.elapsed_s
            rounded = [round(float(loss), 4) for loss in losses]
            log("distil", step=timebox.num_steps, elapsed_s=round(timebox.elapsed_s, 1), losses=rounded)
