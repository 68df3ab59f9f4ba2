"""Models, their KV memory and their noise. Knows no session and no socket.

A worker loads a model (`load_model`), runs packed batches through its `Runtime`, draws tokens with `draw`, and does all
of it on one `ModelThread`.
"""

from inference.errors import (
    ContextOverflow,
    InferenceError,
    IntegrityError,
    ModelLoadError,
    ModelNotFound,
    OutOfKVBlocks,
    UnknownSequence,
)
from inference.loading import LoadedModel, ModelDescription, load_chat_template, load_model, load_tokenizer_json
from inference.logprobs import RowLogprobs, logprobs
from inference.model_thread import Engine, ModelThread, ModelThreadStopped, StepResult
from inference.noise import gumbel, random_bits, uniform
from inference.paged_runtime import PagedRuntime
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
    "draw",
    "gumbel",
    "load_chat_template",
    "load_model",
    "load_tokenizer_json",
    "logprobs",
    "random_bits",
    "uniform",
    "warm_up",
    "warped",
]
