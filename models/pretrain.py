"""Training the target: next-token prediction on the corpus."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from corpus import batches
from evaluate import heldout_loss
from graphed import GraphedStep
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


def logits_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits of whole rows, [rows, length, vocabulary].

    The same as `model(ids).logits`, which looks at values to choose a mask and so cannot be recorded as a graph.
    """
    core = model.model
    hidden = core.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    tables = core.rotary_emb(hidden, position_ids=positions)
    for layer in core.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=tables)
    return model.lm_head(core.norm(hidden))


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token but the first, [rows, length - 1], in fp32."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


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
    graphs: bool,
    eval_every_s: float = 20.0,
) -> None:
    """Train until the timebox is spent, on rows of each of `lengths` in turn: short ones teach cold starts."""

    def learn(ids: torch.Tensor) -> tuple[torch.Tensor]:
        with autocast(ids.device):
            loss = token_losses(logits_of(model, ids), ids).mean()
        loss.backward()
        optimizers.step()
        return (loss.detach(),)

    streams = [batches(train_ids, length, batch_tokens // length, seed + length) for length in lengths]
    steps = [GraphedStep(learn, graphs) for _ in lengths]
    model.train()
    last_eval_s = 0.0
    running: list[torch.Tensor] = []
    while timebox.progress < 1:
        turn = timebox.num_steps % len(streams)
        optimizers.set_rate(timebox.rate_factor())
        (loss,) = steps[turn](next(streams[turn]))
        timebox.advance()
        running.append(loss.clone())
        if timebox.elapsed_s - last_eval_s > eval_every_s or timebox.progress >= 1:
            last_eval_s = timebox.elapsed_s
            train_loss = float(torch.stack(running[-100:]).mean())
            with eager(model), autocast(held_out.device):
                found = heldout_loss(model, held_out)
            log(
                "target",
                step=timebox.num_steps,
                elapsed_s=round(timebox.elapsed_s, 1),
                epochs=round(timebox.num_steps * batch_tokens / len(train_ids), 2),
                train_loss=round(train_loss, 4),
                heldout_loss=round(found, 4),
            )
