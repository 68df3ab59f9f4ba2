"""``python -m outrider.bench.transformers_worker MODEL THREADS DEVICE DTYPE``: what people would use instead.

Plain ``generate`` with its own KV cache, same weights, dtype and threads as the target worker. One JSON object a line:
tasks on standard input, answers on standard output, until the input ends. The clock starts at the call of
``generate``, with the prompt tokenised and on the device.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import IO, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar


class _FirstToken(BaseStreamer):
    """Notes when the first token came."""

    def __init__(self) -> None:
        self.at_s = 0.0
        self._num_calls = 0

    def put(self, value: torch.Tensor) -> None:
        self._num_calls += 1
        if self._num_calls == 2:  # the first call brings the prompt
            self.at_s = time.perf_counter()

    def end(self) -> None:
        """Nothing is held back."""


class Generator:
    """A model as transformers loads and runs it."""

    def __init__(self, model: str, device: str, dtype: str) -> None:
        self._device = _device(device)
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
        auto_model: Any = AutoModelForCausalLM
        self._model = auto_model.from_pretrained(model, dtype=_dtype(dtype, self._device)).to(self._device).eval()
        pad = self._model.generation_config.pad_token_id
        self._model.generation_config.eos_token_id = None  # all runs have the same length
        self._model.generation_config.pad_token_id = 0 if pad is None else pad

    def run(self, task: dict[str, Any]) -> dict[str, object]:
        """One completion of exactly ``max_tokens`` tokens."""
        torch.manual_seed(task["seed"])
        prompt = torch.tensor([self._tokenizer(task["prompt"]).input_ids], device=self._device)
        first = _FirstToken()
        start_s = time.perf_counter()
        output = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=task["max_tokens"],
            use_cache=True,
            streamer=first,
            **_sampling(task["temperature"]),
        )
        token_ids = output[0, prompt.shape[1] :].tolist()
        total_s = time.perf_counter() - start_s
        return {"token_ids": token_ids, "first_token_s": first.at_s - start_s, "total_s": total_s}


def main() -> None:
    model, num_threads, device, dtype = sys.argv[1:]
    answers = _take_stdout()
    torch.set_num_threads(int(num_threads))
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        generator = Generator(model, device, dtype)
    except (OSError, ValueError, RuntimeError) as error:
        _send(answers, {"error": f"cannot load {model}: {error}"})
        return
    _send(answers, {"ready": True})
    for line in sys.stdin:
        _send(answers, generator.run(json.loads(line)))


def _take_stdout() -> IO[str]:
    """Standard output for the answers alone: what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _send(answers: IO[str], answer: dict[str, object]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


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
