"""Models, their KV memory and their noise. Knows no session and no socket.

A worker loads a model (`load_model`), runs packed batches through its `Runtime`, draws tokens with `draw`, and does all
of it on one `ModelThread`.
"""

from inference.draft_distribution import pick, truncated_weights
from inference.errors import (
    ContextOverflow,
    InferenceError,
    IntegrityError,
    ModelLoadError,
    ModelNotFound,
    OutOfKVBlocks,
    UnknownSequence,
)
from inference.loading import (
    LoadedModel,
    LoadedTokenizer,
    ModelDescription,
    load_model,
    load_tokenizer,
    load_tokenizer_json,
)
from inference.logprobs import RowLogprobs, logprobs
from inference.model_thread import Engine, ModelThread, ModelThreadStopped, StepResult
from inference.noise import gumbel, random_bits, uniform
from inference.paged_runtime import PagedRuntime
from inference.ratio_rows import accept_uniforms, draw_residual, probabilities_at
from inference.runtime import Chunk, Runtime, SequenceId
from inference.sampling import Draws, SamplingRow, draw, warped
from inference.sequence_rows import SamplingParameters, SequenceRows
from inference.warm_up import warm_up

__all__ = [
    "Chunk",
    "ContextOverflow",
    "Draws",
    "Engine",
    "InferenceError",
    "IntegrityError",
    "LoadedModel",
    "LoadedTokenizer",
    "ModelDescription",
    "ModelLoadError",
    "ModelNotFound",
    "ModelThread",
    "ModelThreadStopped",
    "OutOfKVBlocks",
    "PagedRuntime",
    "RowLogprobs",
    "Runtime",
    "SamplingParameters",
    "SamplingRow",
    "SequenceId",
    "SequenceRows",
    "StepResult",
    "UnknownSequence",
    "accept_uniforms",
    "draw",
    "draw_residual",
    "gumbel",
    "load_model",
    "load_tokenizer",
    "load_tokenizer_json",
    "logprobs",
    "pick",
    "probabilities_at",
    "random_bits",
    "truncated_weights",
    "uniform",
    "warm_up",
    "warped",
]
