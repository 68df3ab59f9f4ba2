"""From a name or a folder to a model that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from inference.attention import ATTENTION_NAME, AttentionBackend, register_attention
from inference.compiled_forward import is_worth_compiling
from inference.errors import ModelLoadError
from inference.fused_choice import choose_forward
from inference.hub import explain, fetch, quiet_progress
from inference.matmul_attention import MatmulBackend
from inference.model_forward import ModelForward, TransformersForward
from inference.model_probe import probe, usable_context
from inference.paged_runtime import PagedRuntime
from inference.sdpa_attention import SdpaBackend
from inference.step_graphs import CudaRecorder, Recorder
from inference.weight_layout import store_weights_by_input

DEFAULT_KV_TOKENS = 16_384
DEFAULT_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a worker may say about its model."""

    name: str
    """As it was asked for: a folder or a hub name."""
    architecture: str
    """The transformers class, e.g. `LlamaForCausalLM`."""
    vocab_size: int
    """Columns of the logits."""
    max_context: int
    eos_token_ids: tuple[int, ...]
    """Empty if the model names none."""
    num_parameters: int
    dtype: str
    """What it computes in, e.g. `float32`."""
    device: str
    """e.g. `cpu`, `cuda:0`"""
    memory_bytes: int
    """Weights and KV pool together."""
    num_layers: int
    hidden_size: int
    """Width of the states between layers."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    runtime: PagedRuntime
    description: ModelDescription


def load_model(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_tokens: int = DEFAULT_KV_TOKENS,
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_threads: int | None = None,
    backend: AttentionBackend | None = None,
    fuse: bool = True,
    compiled: bool = False,
    graphs: bool | Recorder = True,
    on_progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load a causal language model of Hugging Face and give it a paged KV pool.

    Args:
        name: a folder, or a name on the hub (taken from the local cache if it is there).
        device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where there is one.
        dtype: "float32", "bfloat16", "float16"; "auto" is float32 on CPU and bfloat16 elsewhere, whatever the
            dtype of the stored weights. Where float16 holds them exactly, float32 reads half as much
            (`projections`).
        kv_tokens: positions of all sequences together, rounded up to whole blocks. Allocated now.
        num_threads: CPU threads of the calling thread's operations; None leaves torch's setting.
        backend: how attention is computed; None is `MatmulBackend` on a CPU and `SdpaBackend` elsewhere.
        fuse: run the layers by `FusedForward` where it knows the architecture; False: by transformers always.
        compiled: run small steps of a small model as machine code (`compiled_forward`), where numba is installed.
            Faster than `fuse` alone, but not to the same rounding for any number of rows: for drafts.
        graphs: on CUDA, record the small steps of fused layers as CUDA graphs (`step_graphs`); False: never. A
            recorder is used on any device.
        on_progress: called with one short line per stage.

    Raises:
        ModelNotFound: no such folder, or not on the hub.
        ModelLoadError: everything else, in one line that says what to do.
    """
    report = on_progress or (lambda stage: None)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    report(f"reading weights of {name}")
    model = load_weights(str(name), torch_dtype, torch_device)
    with explain(str(name), "lower kv_tokens, or use another model or device"):
        probed, max_context = probe(model), usable_context(model)
        compiles = compiled and fuse and backend is None and is_worth_compiling(model)
        if compiles:
            report("compiling its layers: some seconds the first time, then they are kept")
        backend = backend or _backend(torch_device, compiles)
        forward: ModelForward = TransformersForward(model)
        if fuse:
            forward = choose_forward(model, backend, probed, max_context, compiles)
        recorder = _recorder(graphs, torch_device)
        report(f"allocating a KV pool of {kv_tokens:,} tokens" + (", recording steps" if recorder else ""))
        runtime = PagedRuntime(
            model,
            forward,
            backend,
            probed.geometry,
            num_blocks=-(-kv_tokens // block_size),
            block_size=block_size,
            max_context=max_context,
            recorder=recorder,
        )
    return LoadedModel(runtime, _describe(str(name), model, runtime))


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer for those who have no transformers."""

    json: str
    """The `tokenizer.json` form, to be read by the `tokenizers` library alone."""
    chat_template: str
    """Jinja; empty if there is none."""
    special_tokens: Mapping[str, str]
    """What a template may call by name, e.g. `bos_token`."""


def load_tokenizer_json(name: str | Path) -> str:
    """`LoadedTokenizer.json` alone; raises as `load_tokenizer`."""
    return load_tokenizer(name).json


def load_tokenizer(name: str | Path) -> LoadedTokenizer:
    """The model's tokenizer.

    Raises:
        ModelNotFound, ModelLoadError: as `load_model`; also for a tokenizer that has no `tokenizer.json` form.
    """
    with explain(str(name), "put the model's tokenizer.json into its folder"):
        tokenizer = fetch(str(name), lambda local: AutoTokenizer.from_pretrained(str(name), local_files_only=local))
        fast = getattr(tokenizer, "backend_tokenizer", None)
        if fast is None:
            raise ModelLoadError(
                f"{name}: its tokenizer has no tokenizer.json form: convert it with transformers first"
            )
        special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        return LoadedTokenizer(str(fast.to_str()), _chat_template(tokenizer.chat_template), special)


def _chat_template(given: object) -> str:
    """Some models have several, by name."""
    template = given.get("default") if isinstance(given, dict) else given
    return template if isinstance(template, str) else ""


def load_weights(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model as transformers makes it, in eval mode, with our attention; raises as `load_model`."""

    def load(local_files_only: bool) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=ATTENTION_NAME, local_files_only=local_files_only
        )
        return model

    register_attention()
    with explain(name, "check its files, or download it again"), quiet_progress():
        model: torch.nn.Module = fetch(name, load)
        model.to(device).eval().requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    if device.type == "cpu":
        store_weights_by_input(model)
    return model


def _device(setting: str) -> torch.device:
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(setting)
    except RuntimeError as error:
        raise ModelLoadError(f"device {setting!r} is not known to torch: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"device {setting!r} was asked for, but torch sees no CUDA here: use device cpu")
    return device


def _backend(device: torch.device, compiles: bool) -> AttentionBackend:
    """How attention is computed unless it is said; compiled layers want keys as they come."""
    return MatmulBackend(keys_by_dim=not compiles) if device.type == "cpu" else SdpaBackend()


def _recorder(graphs: bool | Recorder, device: torch.device) -> Recorder | None:
    if not isinstance(graphs, bool):
        return graphs
    return CudaRecorder(device) if graphs and device.type == "cuda" else None


def _dtype(setting: str, device: torch.device) -> torch.dtype:
    if setting == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        return _DTYPES[setting]
    except KeyError:
        raise ModelLoadError(f"dtype {setting!r} is not one of auto, {', '.join(_DTYPES)}") from None


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _describe(name: str, model: PreTrainedModel, runtime: PagedRuntime) -> ModelDescription:
    config = model.config.get_text_config()
    return ModelDescription(
        name=name,
        architecture=type(model).__name__,
        vocab_size=runtime.vocab_size,
        max_context=runtime.max_context,
        eos_token_ids=_eos_token_ids(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        memory_bytes=runtime.num_weight_bytes + runtime.num_kv_bytes,
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
    )


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The generation config knows more than the model config: chat models end on several tokens."""
    for config in (model.generation_config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()
