"""Training steps recorded once and replayed: a deep and narrow model is limited by launches, not by arithmetic."""

from collections.abc import Callable

import torch

NUM_WARMUP_CALLS = 3


class GraphedStep:
    """A training step over fixed shapes, replayed as one CUDA graph from its fourth call on; on a CPU just called.

    The step takes tensors, works on parameters in place, and must not read a tensor's value. What it returns is
    overwritten by the next call. A call returns when the device is done, so that a timebox sees the time spent.
    """

    def __init__(self, step: Callable[..., tuple[torch.Tensor, ...]], graphs: bool):
        self.step, self.graphs = step, graphs
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.num_calls = 0

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.num_calls += 1
        if not self.graphs:
            self.outputs = self.step(*inputs)
        elif self.num_calls <= NUM_WARMUP_CALLS:
            self._warm_up(inputs)
        else:
            self._replay(inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        return self.outputs

    def _warm_up(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """A real step on a side stream, where compilation and lazy states happen before the recording."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.outputs = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(side)

    def _replay(self, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.graph is None:
            self.inputs = tuple(given.clone() for given in inputs)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.step(*self.inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
