"""``python -m outrider.bench.transformers_worker MODEL THREADS DEVICE DTYPE ASSISTANT``: what people use instead.

``generate`` with its own KV cache: plain, with an assistant model (ASSISTANT, may be empty), or with prompt lookup;
same weights, dtype and threads as the target worker. One JSON object a line: tasks on standard input, answers on
standard output, until the input ends. The clock starts at the call of ``generate``, with the prompt tokenised and on
the device.

Assisted generation runs with 5 drafted tokens, always. On the demo pair (two cores, 6 prompts of 64 tokens) that was
faster than transformers' defaults, which draft up to 20 while the assistant is sure: 170 against 160 tokens/s greedy,
139 against 137 at temperature 0.8. With 4 or 6 the differences were within the noise.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from outrider.bench.json_answers import serve

NUM_ASSISTANT_TOKENS: Final = 5
NUM_LOOKUP_TOKENS: Final = 5
"""Of 3, 5 and 10 the fastest on the demo pair when greedy."""


class _FirstTokens(BaseStreamer):
    """Notes when the first tokens came, and how many."""

    def __init__(self) -> None:
        self.at_s = 0.0
        self.count = 0
        self._num_calls = 0

    def put(self, value: torch.Tensor) -> None:
        self._num_calls += 1
        if self._num_calls == 2:  # the first call brings the prompt
            self.at_s = time.perf_counter()
            self.count = value.numel()

    def end(self) -> None:
        """Nothing is held back."""


class Generator:
    """A model, and perhaps its assistant, as transformers loads and runs them."""

    def __init__(self, model: str, device: str, dtype: str, assistant: str) -> None:
        self._device = _device(device)
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
        self._model = self._load(model, dtype)
        self._ways: dict[str, dict[str, object]] = {
            "plain": {},
            "lookup": {"prompt_lookup_num_tokens": NUM_LOOKUP_TOKENS},
        }
        if assistant:
            self._ways["assisted"] = {"assistant_model": self._load_assistant(assistant, dtype)}

    def _load(self, name: str, dtype: str) -> Any:
        auto_model: Any = AutoModelForCausalLM
        model = auto_model.from_pretrained(name, dtype=_dtype(dtype, self._device)).to(self._device).eval()
        pad = model.generation_config.pad_token_id
        model.generation_config.eos_token_id = None  # all runs have the same length
        model.generation_config.pad_token_id = 0 if pad is None else pad
        return model

    def _load_assistant(self, name: str, dtype: str) -> Any:
        assistant = self._load(name, dtype)
        assistant.generation_config.num_assistant_tokens = NUM_ASSISTANT_TOKENS
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        return assistant

    def run(self, task: dict[str, Any]) -> dict[str, object]:
        """One completion of exactly ``max_tokens`` tokens."""
        torch.manual_seed(task["seed"])
        prompt = torch.tensor([self._tokenizer(task["prompt"]).input_ids], device=self._device)
        first = _FirstTokens()
        start_s = time.perf_counter()
        output = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=task["max_tokens"],
            use_cache=True,
            streamer=first,
            **self._ways[task["mode"]],
            **_sampling(task["temperature"]),
        )
        token_ids = output[0, prompt.shape[1] :].tolist()
        total_s = time.perf_counter() - start_s
        return {
            "token_ids": token_ids,
            "first_token_s": first.at_s - start_s,
            "num_first_tokens": first.count,
            "total_s": total_s,
        }


def main() -> None:
    model, num_threads, device, dtype, assistant = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]  # its own code warns of its own deprecated arguments
    serve(lambda: Generator(model, device, dtype, assistant).run)


def _sampling(temperature: float) -> dict[str, object]:
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def _device(setting: str) -> torch.device:
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(setting)


def _dtype(setting: str, device: torch.device) -> torch.dtype:
    """As the target worker chooses it."""
    if setting == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, setting)
    assert isinstance(dtype, torch.dtype)
    return dtype


if __name__ == "__main__":
    main()
