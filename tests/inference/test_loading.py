"""Loading: what is described, which dtype is chosen, and that every failure is one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GptOssConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from inference import Chunk, ModelLoadError, ModelNotFound, load_model, load_tokenizer_json
from inference.loading import load_weights
from inference.model_probe import usable_context

from .tiny_models import CONFIGS, VOCAB_SIZE, save_tiny_model

CPU = torch.device("cpu")


def test_description(llama_folder: Path) -> None:
    stages: list[str] = []
    loaded = load_model(llama_folder, device="cpu", kv_tokens=100, on_progress=stages.append)
    description = loaded.description
    assert description.name == str(llama_folder)
    assert description.architecture == "LlamaForCausalLM"
    assert (description.vocab_size, description.max_context) == (VOCAB_SIZE, 112)
    assert description.eos_token_ids == (2,)
    assert (description.dtype, description.device) == ("float32", "cpu")
    num_parameters = 2 * VOCAB_SIZE * 48 + 2 * (48 * 16 * (4 + 2 + 2 + 4) + 3 * 48 * 64 + 2 * 48) + 48
    assert description.num_parameters == num_parameters
    kv_bytes = 2 * 2 * 2 * 112 * 16 * 4  # keys and values, layers, heads, slots, dim, bytes
    assert 0 <= description.memory_bytes - kv_bytes - 4 * num_parameters < 1000
    assert len(stages) == 2


def test_bfloat16_weights_run_in_float32_on_cpu(tmp_path: Path) -> None:
    save_tiny_model("llama-gqa", tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_model(tmp_path, device="cpu", kv_tokens=64)
    assert loaded.description.dtype == "float32"
    assert loaded.runtime.forward([Chunk(loaded.runtime.open(), [1], 1)]).dtype == torch.float32
    parameters = list(load_weights(str(tmp_path), torch.float32, CPU).parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in parameters)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CONFIGS["llama-gqa"]()
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_weights(str(tmp_path), torch.float32, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_contiguous()
    assert model.model.layers[0].mlp.up_proj.weight.stride(0) == 1  # by input


def test_several_eos_tokens(tmp_path: Path, llama_folder: Path) -> None:
    save_tiny_model("llama-gqa", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert load_model(tmp_path, device="cpu", kv_tokens=64).description.eos_token_ids == (2, 9)


def test_tokenizer_json_can_be_read_without_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"def": 0, "return": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    restored = Tokenizer.from_str(load_tokenizer_json(tmp_path))
    assert restored.encode("return def").ids == [1, 0]


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not safetensors")


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_thing"}))


@pytest.mark.parametrize("damage", [_break_config, _break_weights, _remove_weights, _unknown_architecture])
def test_damaged_model(tmp_path: Path, damage: object) -> None:
    save_tiny_model("llama-gqa", tmp_path)
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(ModelLoadError) as caught:
        load_model(tmp_path, device="cpu", kv_tokens=64)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} cannot be loaded (")
    assert message.endswith("): check its files, or download it again")
    assert "\n" not in message
    assert len(message) < 400


def test_model_without_a_tokenizer(llama_folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"put the model's tokenizer\.json into its folder"):
        load_tokenizer_json(llama_folder)


def test_a_pool_too_large_for_memory(llama_folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="lower kv_tokens"):
        load_model(llama_folder, device="cpu", kv_tokens=2**50)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"without a config\.json"):
        load_model(tmp_path)
    with pytest.raises(ModelNotFound, match=r"without a config\.json"):
        load_tokenizer_json(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/none", "two words", "a/b/c"])
def test_not_a_folder(name: str) -> None:
    with pytest.raises(ModelNotFound, match="is not a folder"):
        load_model(name)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (URLError("no route"), "cannot be reached"),
        (TimeoutError("slow"), "cannot be reached"),
        (HTTPError("", 404, "", None, None), "nor a model on"),
    ],
)
def test_hub_name_that_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: Exception, message: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise answer

    monkeypatch.setattr("inference.hub.urlopen", refuse)
    with pytest.raises(ModelNotFound, match=message) as caught:
        load_model("outrider-tests/no-such-model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"device": "tpu9"}, {"dtype": "int3"}, {"device": "cuda:7"}])
def test_impossible_settings(llama_folder: Path, setting: dict[str, str]) -> None:
    if setting.get("device", "").startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ModelLoadError, match=next(iter(setting.values()))):
        load_model(llama_folder, **setting)


def test_attention_sinks_are_refused(tmp_path: Path) -> None:
    """GPT-OSS adds a learned sink to every softmax: attention without it would be quietly wrong."""
    config = GptOssConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="s_aux"):
        load_model(tmp_path, device="cpu", kv_tokens=64)


def test_layers_of_unknown_kind_are_refused(llama_folder: Path) -> None:
    from inference.model_probe import probe

    model = load_weights(str(llama_folder), torch.float32, CPU)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ModelLoadError, match="chunked_attention"):
        probe(model)


def test_context_is_cut_where_rope_depends_on_the_batch(llama_folder: Path) -> None:
    model = load_weights(str(llama_folder), torch.float32, CPU)
    assert usable_context(model) == 128
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    model.config = LlamaConfig(max_position_embeddings=128, rope_parameters=rope)
    assert usable_context(model) == 32


def test_a_loaded_model_runs(llama_folder: Path) -> None:
    runtime = load_model(llama_folder, device="cpu", kv_tokens=64, num_threads=1).runtime
    assert runtime.forward([Chunk(runtime.open(), [1, 2, 3], 2)]).shape == (2, VOCAB_SIZE)
