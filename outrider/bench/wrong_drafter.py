"""``python -m outrider.bench.wrong_drafter SOURCE DESTINATION``: a drafter that is always wrong, and sure of it.

Random weights in the shape of SOURCE, with its tokenizer. The head is not tied to the embeddings, else the model would
repeat its last token, which is sometimes right; and it is scaled up, else at a temperature above 0 the noise, which
target and drafter share, would decide, and be right now and then.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

_HEAD_SCALE = 50.0


def make(source: str, destination: str) -> None:
    """Writes model and tokenizer into the folder ``destination``."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    config = AutoConfig.from_pretrained(source)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    auto_model: Any = AutoModelForCausalLM
    model = auto_model.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(_HEAD_SCALE)
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(source).save_pretrained(destination)


if __name__ == "__main__":
    make(*sys.argv[1:])
