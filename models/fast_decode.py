"""Decoding thousands of rows at once for training data: a fixed KV cache, and on CUDA one graph replay per token.

`decode.decode` says what the result is; this is the same for greedy rows up to rounding, and many times as fast.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from decode import Rows, gumbel_like, pad_prompts
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

NUM_SEGMENTS = 4


class FastDecoder:
    """Continues exactly `rows` prompts to exactly `length` tokens with a copy of a Llama in `dtype`.

    Everything, the draw included, happens on the device in `_step`, which reads and writes fixed buffers. The step
    attends to a fixed number of cached positions; there is one graph for each quarter of the length.
    """

    def __init__(self, model: LlamaForCausalLM, rows: int, length: int, dtype: torch.dtype):
        config = model.config
        self.device, self.rows, self.length = model.device, rows, length
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for param in self.model.parameters():
            param.data = param.data.to(dtype)
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.ids = torch.zeros(rows, length + 1, dtype=torch.long, device=self.device)
        self.starts = torch.ones(rows, dtype=torch.long, device=self.device)
        self.temperatures = torch.zeros(rows, device=self.device)
        self.num_warm = torch.zeros((), dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        positions = torch.arange(length, device=self.device)[None]
        cos, sin = self.model.model.rotary_emb(self.keys[0, :1, 0], positions)
        self.cos, self.sin = cos[0], sin[0]
        bounds = [length * (index + 1) // NUM_SEGMENTS for index in range(NUM_SEGMENTS)]
        with torch.no_grad():
            self.segments = [(bound, self._capture(bound)) for bound in bounds]

    def refresh(self, model: LlamaForCausalLM) -> None:
        """Take over the weights of `model`."""
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.data.copy_(theirs.data)

    @torch.no_grad()
    def decode(self, prompts: Sequence[Sequence[int]], temperatures: torch.Tensor | float, num_warm: int = 0) -> Rows:
        """As `decode.decode`. The result is a copy."""
        padded, starts = pad_prompts(prompts, self.device)
        self.ids.zero_()
        self.ids[:, : padded.shape[1]] = padded
        self.starts.copy_(starts)
        self.temperatures.copy_(torch.as_tensor(temperatures).expand(self.rows))
        self.num_warm.fill_(num_warm)
        self.position.zero_()
        position = 0
        for bound, step in self.segments:
            while position < min(bound, self.length - 1):
                step()
                position += 1
        return Rows(self.ids[:, : self.length].clone(), self.starts.clone())

    def _capture(self, bound: int) -> Callable[[], None]:
        """A step over the first `bound` positions, as a graph where there is CUDA."""
        if self.device.type != "cuda":
            return lambda: self._step(bound)
        self.position.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(bound)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(bound)
        return graph.replay

    def _step(self, bound: int) -> None:
        """Feed the token at the position, then write the next one unless the prompt has it."""
        fed = self.ids.index_select(1, self.position)
        logits = self._forward(fed, bound)
        following = self.position + 1
        warm = following < self.starts + self.num_warm
        heat = self.temperatures.masked_fill(warm, 1.0)[:, None]
        # Noise times temperature is a draw at that temperature, and at 0 it is the argmax.
        drawn = (logits.float() + heat * gumbel_like(logits.float())).argmax(-1)
        given = self.ids.index_select(1, following)[:, 0]
        self.ids.index_copy_(1, following, torch.where(following < self.starts, given, drawn)[:, None])
        self.position.add_(1)

    def _forward(self, fed: torch.Tensor, bound: int) -> torch.Tensor:
        """Logits after one token per row, [rows, vocabulary]. Keys and values go into the cache at the position."""
        cos, sin = (table.index_select(0, self.position)[None] for table in (self.cos, self.sin))
        unseen = torch.arange(bound, device=self.device) > self.position
        hidden = self.model.model.embed_tokens(fed)
        for layer, keys, values in zip(self.model.model.layers, self.keys, self.values, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            query, key, value = (
                project(normed).view(self.rows, 1, -1, keys.shape[-1]).transpose(1, 2) for project in projections
            )
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            keys.index_copy_(2, self.position, key)
            values.index_copy_(2, self.position, value)
            scores = query @ keys[:, :, :bound].mT * attention.scaling
            weights = scores.float().masked_fill(unseen, float("-inf")).softmax(-1).to(value.dtype)
            mixed = (weights @ values[:, :, :bound]).transpose(1, 2).reshape(self.rows, 1, -1)
            hidden = hidden + attention.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.model.model.norm(hidden))[:, 0]
