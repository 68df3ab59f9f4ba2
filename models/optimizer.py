"""Muon for matrices, AdamW for embeddings and norms, and a rate that is constant and then falls to zero."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Quintic Newton-Schulz iteration towards the nearest semi-orthogonal matrix. Shape [..., rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Keller Jordan's coefficients
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with decoupled weight decay.

    Unlike `torch.optim.Muon` it stacks matrices of one shape, so that a deep and narrow model costs a few batched
    products per step and not thousands of small ones.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for param in params:
            by_shape[param.shape].append(param)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            grad = torch.stack([param.grad for param in params])
            state = self.state[params[0]]
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            momentum = state["momentum"]
            momentum.lerp_(grad, 1 - group["momentum"])
            update = orthogonalise(grad.lerp(momentum, group["momentum"]))
            rows, columns = params[0].shape
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            scale = max(1.0, rows / columns) ** 0.5
            torch._foreach_sub_(params, list((update * (group["lr"] * scale)).unbind()))


class Optimizers:
    """Both optimizers behind one `step`; `set_rate` takes the factor of the schedule."""

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float):
        params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        matrices = [param for name, param in params if param.ndim == 2 and "embed" not in name]
        others = [param for name, param in params if param.ndim != 2 or "embed" in name]
        on_cuda = others[0].is_cuda
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(
                others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=on_cuda, capturable=on_cuda
            ),
        ]
        self.peak_lr = [muon_lr, adam_lr]
        # Rates are tensors, so that a recorded step sees them change.
        self.rates = [torch.zeros((), device=others[0].device) for _ in self.optimizers]
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate

    def set_rate(self, factor: float) -> None:
        """Set both rates to `factor` of their peaks."""
        for rate, peak in zip(self.rates, self.peak_lr, strict=True):
            rate.fill_(peak * factor)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Timebox:
    """Counts a stage's progress from 0 to 1 by steps or by time, whichever runs out first.

    The clock starts at the end of the first `num_warmup` steps, which may compile.
    """

    def __init__(self, minutes: float, max_steps: int, num_warmup: int = 10):
        self.limit_s, self.max_steps, self.num_warmup = minutes * 60, max_steps, num_warmup
        self.num_steps = 0
        self.started_s = time.monotonic()

    def advance(self) -> None:
        self.num_steps += 1
        if self.num_steps == self.num_warmup:
            self.started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def progress(self) -> float:
        by_time = self.elapsed_s / self.limit_s if self.num_steps >= self.num_warmup else 0.0
        return min(1.0, max(by_time, self.num_steps / self.max_steps))

    def rate_factor(self, fall_from: float = 0.5) -> float:
        """A short rise, then constant, then falling linearly from `fall_from` of the stage to its end."""
        rise = min(1.0, (self.num_steps + 1) / 40)
        return rise * min(1.0, (1.0 - self.progress) / (1.0 - fall_from))
