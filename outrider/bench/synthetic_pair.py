"""``python -m outrider.bench.synthetic_pair SOURCE FOLDER TEMPERATURE ACCEPTANCE...``: pairs with acceptance as a dial.

Random weights in the shape of SOURCE. The draft is the target's first layers, the output of the target's other layers
is scaled by epsilon: the compute is real, the output valid, and the acceptance rate goes from 1 to 0 as epsilon grows.
For each ACCEPTANCE wanted (accepted drafted tokens over verified ones, at K = 1, on the target's own text) epsilon is
found by bisection. Writes FOLDER/draft, and FOLDER/target-ACCEPTANCE for each.

Random weights repeat themselves when greedy, so that few positions decide; the dial is made for temperatures above 0.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

DRAFT_LAYERS: Final = 2
HEAD_SCALE: Final = 24.0
"""Spreads the logits so that text at temperature 1 is neither noise nor certain."""
_NUM_TEXTS, _NUM_TOKENS = 8, 128
_NUM_PROMPT: Final = 8
_LOG_EPSILONS: Final = (-5.0, 5.0)
_NUM_HALVINGS: Final = 9
_NUM_TEXT_ROUNDS: Final = 2
"""The text is the target's own, and the target changes with epsilon: found on random text first, then on its own."""


class SyntheticPair:
    """A target of random weights, its first layers as the draft, and the dial."""

    def __init__(self, config: Any, num_draft_layers: int, temperature: float) -> None:
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False  # else it would repeat its last token
        auto_model: Any = AutoModelForCausalLM
        self.target: Any = auto_model.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            self.target.get_output_embeddings().weight.mul_(HEAD_SCALE)
        self.draft: Any = self._first_layers(num_draft_layers)
        self._tail = [
            (projection, projection.clone())
            for layer in self.target.model.layers[num_draft_layers:]
            for projection in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)
        ]
        self._temperature = temperature
        self._noise = -torch.log(-torch.log(torch.rand(_NUM_TEXTS, _NUM_TOKENS, config.vocab_size).clamp(1e-9)))

    def _first_layers(self, count: int) -> Any:
        config = copy.deepcopy(self.target.config)
        config.num_hidden_layers = count
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:count]
        auto_model: Any = AutoModelForCausalLM
        draft = auto_model.from_config(config, dtype=torch.float32)
        draft.load_state_dict(self.target.state_dict(), strict=False)
        return draft.eval()

    def set_epsilon(self, epsilon: float) -> None:
        """What the layers behind the draft's add, as a multiple of what they were made with."""
        with torch.no_grad():
            for weight, original in self._tail:
                weight.copy_(original * epsilon)

    @torch.inference_mode()
    def agreement(self, texts: torch.Tensor) -> float:
        """Share of the positions of ``texts`` [count, length] where both draw the same token."""
        target, draft = (
            self._draws(model(input_ids=texts, use_cache=False).logits) for model in (self.target, self.draft)
        )
        return float((target == draft)[:, _NUM_PROMPT:].float().mean())

    def _draws(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits + self._temperature * self._noise).argmax(-1)

    @torch.inference_mode()
    def own_text(self) -> torch.Tensor:
        """What the target says after short random prompts."""
        prompts = self.random_text()[:, :_NUM_PROMPT]
        text: torch.Tensor = self.target.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=_NUM_TOKENS - _NUM_PROMPT,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[lambda ids, scores: scores + self._temperature * self._noise[:, ids.shape[1] - 1]],
        )
        return text

    def random_text(self) -> torch.Tensor:
        return torch.randint(self.target.config.vocab_size, (_NUM_TEXTS, _NUM_TOKENS))

    def turn_to(self, acceptance: float) -> float:
        """Sets the epsilon with which so many drafted tokens are accepted, and returns the agreement that was found."""
        texts = self.random_text()
        for _ in range(_NUM_TEXT_ROUNDS):
            self._bisect(acceptance, texts)
            texts = self.own_text()
        return self.agreement(texts)

    def _bisect(self, acceptance: float, texts: torch.Tensor) -> None:
        low, high = _LOG_EPSILONS
        for _ in range(_NUM_HALVINGS):
            middle = (low + high) / 2
            self.set_epsilon(math.exp(middle))
            low, high = (middle, high) if self.agreement(texts) > acceptance else (low, middle)


def make(source: str, folder: str, temperature: float, acceptances: list[str]) -> None:
    """Writes the draft, and a target for each acceptance, with SOURCE's tokenizer."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(source)
    pair = SyntheticPair(AutoConfig.from_pretrained(source), DRAFT_LAYERS, temperature)
    pair.draft.save_pretrained(Path(folder) / "draft")
    tokenizer.save_pretrained(Path(folder) / "draft")
    for acceptance in acceptances:
        pair.turn_to(float(acceptance))
        pair.target.save_pretrained(Path(folder) / f"target-{acceptance}")
        tokenizer.save_pretrained(Path(folder) / f"target-{acceptance}")


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4:])
