"""Make the demo pair: tokenizer, target, draft and held-out prompts, from the standard library of this Python.

    python models/train.py --out /tmp/pair --device cuda
    python models/train.py --out /tmp/pair --quick              # the whole pipeline in about a minute, useless weights

How the pair that ships was made, in four runs: models/README.md.

Stages: corpus and tokenizer; target by next-token prediction; a finish against greedy loops and towards what a draft
can foresee; rounding to bf16, so that the draft learns from the weights that ship; the target's own continuations; the
draft by distillation; measures.
"""

import argparse
import json
import platform
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from arguments import parse_arguments
from corpus import (
    EOS,
    NUM_PROMPTS,
    cut_prompts,
    cut_rows,
    encode_files,
    read_library,
    save_tokenizer,
    train_tokenizer,
    windows,
    write_heldout_prompts,
)
from distil import Student, distil, divergence, make_lessons, sample_continuations, start_from_target
from evaluate import heldout_loss, measure
from finish import Finish, FinishSettings, finish_target
from optimizer import Optimizers, Timebox
from pretrain import add_dropout, train_target
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

MAX_POSITIONS = 2048
SAMPLES_FILE = "samples.pt"


class JsonLog:
    """Prints one JSON line per event and appends it to a file."""

    def __init__(self, path: Path):
        self.path, self.started_s = path, time.monotonic()
        path.write_text("")

    def __call__(self, stage: str, **values: object) -> None:
        line = json.dumps({"stage": stage, "t_s": round(time.monotonic() - self.started_s, 1), **values})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


@dataclass(slots=True)
class Data:
    """The corpus in ids: `train` [tokens], `held_out` [rows, length], and prompts from training and held-out files.

    `prompt_rows` and `heldout_rows` [rows, length] are whole rows that begin as prompts do.
    """

    tokenizer: Tokenizer
    eos: int
    train: torch.Tensor
    held_out: torch.Tensor
    prompt_rows: torch.Tensor
    heldout_rows: torch.Tensor
    train_prompts: list[list[int]]
    heldout_prompts: list[list[int]]


def prepare_data(args: argparse.Namespace, log: JsonLog) -> Data:
    """Read the library, train and save the tokenizer, encode, and write the held-out prompts."""
    files = read_library(args.stdlib, args.max_files)
    train_files = [file for file in files if not file.held_out]
    held_files = [file for file in files if file.held_out]
    if args.from_pair or args.from_unfinished:
        folder = args.from_unfinished or args.from_pair / "target"
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer([file.text for file in train_files], args.vocab_size)
    for name in ("target", "draft"):
        save_tokenizer(tokenizer, args.out / name, MAX_POSITIONS)
    heldout_texts = cut_prompts(held_files, NUM_PROMPTS, args.seed)
    library = args.stdlib.name if args.stdlib else f"Python {platform.python_version()}"
    source = f"held-out files of the standard library of {library}"
    write_heldout_prompts(args.out / "heldout_prompts.json", source, heldout_texts)
    train_texts = cut_prompts(train_files, args.max_train_prompts, args.seed + 1)
    length = 256 if args.quick else 512
    held_ids = encode_files(tokenizer, held_files, args.seed)
    data = Data(
        tokenizer,
        tokenizer.token_to_id(EOS),
        encode_files(tokenizer, train_files, args.seed).to(args.device),
        windows(held_ids, min(1024, len(held_ids)))[:96].to(args.device),
        cut_rows(tokenizer, train_files, args.max_train_prompts // 4, length, args.seed + 2).to(args.device),
        cut_rows(tokenizer, held_files, 96, length, args.seed + 3).to(args.device),
        [encoding.ids for encoding in tokenizer.encode_batch(train_texts)],
        [encoding.ids for encoding in tokenizer.encode_batch(heldout_texts)],
    )
    log(
        "corpus",
        library=library,
        num_train_files=len(train_files),
        held_out=[file.path for file in held_files],
        num_train_tokens=len(data.train),
        num_heldout_tokens=data.held_out.numel(),
        num_train_characters=sum(map(len, (file.text for file in train_files))),
    )
    return data


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model is made of."""

    layers: int
    mlp: int
    hidden: int


def target_shape(args: argparse.Namespace) -> Shape:
    return Shape(args.target_layers, args.target_mlp, args.hidden)


def draft_shape(args: argparse.Namespace, spec: str) -> tuple[Shape, float]:
    """The shape, and the weight of total variation, from a spec such as 2x512@1, or 2x512x256@1 to be wider than the
    target."""
    shape, _, tv_weight = spec.partition("@")
    layers, mlp, *hidden = map(int, shape.split("x"))
    return Shape(layers, mlp, hidden[0] if hidden else args.hidden), float(tv_weight or 0)


def make_model(args: argparse.Namespace, shape: Shape, eos: int) -> LlamaForCausalLM:
    """A Llama with heads of 64 or a little more, tied embeddings, and its residual writes scaled down by depth."""
    num_heads = shape.hidden // 64
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=shape.hidden // num_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_((2 * shape.layers) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * shape.layers) ** -0.5)
    return model.to(args.device)


def cast_parameters(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """Cast parameters alone: `model.to(dtype)` would round the rotary frequencies as well."""
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Round the weights to bf16 in place, so that what goes on is what ships, and save them so."""
    cast_parameters(model, torch.bfloat16).save_pretrained(folder)
    cast_parameters(model, torch.float32)


def make_target(args: argparse.Namespace, data: Data, log: JsonLog) -> tuple[LlamaForCausalLM, LlamaForCausalLM | None]:
    """Train, finish, round and save the target. Returns it and, if it was finished, the companion draft."""
    model = make_model(args, target_shape(args), data.eos)
    log("target", num_params=sum(param.numel() for param in model.parameters()))
    handles = add_dropout(model, args.dropout)
    compile_layers(args, model)
    if args.from_unfinished:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.from_unfinished, dtype=torch.float32).state_dict())
    else:
        pretrain(args, data, model, log)
    companion = finish(args, data, model, log) if args.finish_minutes else None
    for handle in handles:
        handle.remove()
    save(model, args.out / "target")
    plain = plain_copy(args, model, target_shape(args), data.eos)
    log(
        "target",
        final=True,
        heldout_loss=round(heldout_loss(plain, data.held_out), 4),
        heldout_loss_after_prompts=round(heldout_loss(plain, data.heldout_rows), 4),
    )
    return plain, companion


def compile_layers(args: argparse.Namespace, model: LlamaForCausalLM) -> None:
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)


def plain_copy(args: argparse.Namespace, model: LlamaForCausalLM, shape: Shape, eos: int) -> LlamaForCausalLM:
    """The same weights without hooks, compilation and gradients."""
    plain = make_model(args, shape, eos)
    plain.load_state_dict(model.state_dict())
    return plain.eval().requires_grad_(False)


def pretrain(args: argparse.Namespace, data: Data, model: LlamaForCausalLM, log: JsonLog) -> None:
    """Train the target on the corpus, round it to bf16 and save it as it is before the finish."""
    optimizers = Optimizers(model, args.muon_lr, args.adam_lr, args.weight_decay)
    timebox = Timebox(args.target_minutes, int(args.target_epochs * len(data.train) / args.batch_tokens) + 1)
    lengths = (512, 2048) if not args.quick else (256,)
    train_target(
        model, data.train, data.held_out, optimizers, timebox, lengths, args.batch_tokens, args.seed, log, args.graphs
    )
    save(model, args.out / "target-unfinished")
    save_tokenizer(data.tokenizer, args.out / "target-unfinished", MAX_POSITIONS)


def load_pair(args: argparse.Namespace) -> tuple[LlamaForCausalLM, LlamaForCausalLM | None]:
    """An existing target and its draft, if it has one, in fp32; the target is copied to the new folder."""

    def load(name: str) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(args.from_pair / name, dtype=torch.float32).to(args.device)

    target = load("target")
    draft = load("draft") if (args.from_pair / "draft" / "config.json").exists() else None
    save(target, args.out / "target")
    return target.eval().requires_grad_(False), draft


def finish(args: argparse.Namespace, data: Data, model: LlamaForCausalLM, log: JsonLog) -> LlamaForCausalLM:
    """Run the finish and return the companion, a draft of the first kind asked for."""
    companion = make_model(args, draft_shape(args, args.draft[0])[0], data.eos)
    start_from_target(companion, model)
    compile_layers(args, companion)
    factor, length = args.finish_lr_factor, data.prompt_rows.shape[1]
    settings = FinishSettings(
        length=length,
        batch_tokens=args.batch_tokens,
        num_rollouts=max(1, args.sample_rows // 2),
        loops_allowed=args.loops_allowed,
        loops_weight=args.loops_weight,
        anchor_weight=args.anchor_weight,
        companion_weight=args.companion_weight,
        loss_budget=args.loss_budget,
        tv_weight=args.finish_tv_weight,
        seed=args.seed,
        graphs=args.graphs,
    )
    models = Finish(
        model,
        plain_copy(args, model, target_shape(args), data.eos),
        companion,
        [
            Optimizers(model, args.muon_lr * factor, args.adam_lr * factor, args.weight_decay),
            Optimizers(companion, args.draft_muon_lr, args.adam_lr, 0.0),
        ],
        settings,
        torch.compile(divergence, dynamic=False) if args.compile else divergence,
    )
    prompts = [prompt[: length // 2] for prompt in data.train_prompts]
    timebox = Timebox(args.finish_minutes, 100_000, num_warmup=4)
    finish_target(models, data.prompt_rows, data.held_out, prompts, timebox, log)
    return companion


def make_student(args: argparse.Namespace, spec: str, source: LlamaForCausalLM, eos: int) -> Student:
    """A draft to train that starts from what fits of `source`."""
    shape, tv_weight = draft_shape(args, spec)
    model = make_model(args, shape, eos)
    start_from_target(model, source)
    loss = torch.compile(divergence, dynamic=False) if args.compile else divergence
    compile_layers(args, model)
    return Student(model, Optimizers(model, args.draft_muon_lr, args.adam_lr, 0.0), tv_weight, loss)


def make_samples(args: argparse.Namespace, data: Data, target: LlamaForCausalLM, log: JsonLog) -> torch.Tensor:
    """The target's own continuations of training prompts, [rows, length]."""
    length = args.sample_length
    prompts = [prompt[: length // 2] for prompt in data.train_prompts]
    return sample_continuations(target, prompts, length, args.sample_rows, args.sample_minutes, args.seed, log)


def load_samples(args: argparse.Namespace) -> torch.Tensor:
    """Continuations that runs with --samples-only saved, all rows together."""
    parts = [torch.load(folder / SAMPLES_FILE) for folder in args.samples]
    return torch.cat(parts).to(args.device, torch.long)


def make_drafts(
    args: argparse.Namespace, data: Data, target: LlamaForCausalLM, companion: LlamaForCausalLM | None, log: JsonLog
) -> list[LlamaForCausalLM]:
    """Distil the drafts on the target's own text and on the corpus, round and save them."""
    samples = load_samples(args) if args.samples else make_samples(args, data, target, log)
    length = samples.shape[1]
    # Mostly its own text: that is what a draft has to foresee. Long windows keep late positions in use.
    lessons = [
        (make_lessons(target, samples), 6),
        (make_lessons(target, windows(data.train, length, length // 2)), 1),
        (make_lessons(target, windows(data.train, min(MAX_POSITIONS, args.draft_batch_tokens))), 1),
    ]
    log("distil", num_lesson_rows=[len(lesson.ids) for lesson, _ in lessons])
    students = [make_student(args, spec, companion or target, data.eos) for spec in args.draft]
    distil(
        target, students, lessons, args.draft_batch_tokens, Timebox(args.distil_minutes, 10**6, 32), log, args.graphs
    )
    drafts = []
    for index, (student, spec) in enumerate(zip(students, args.draft, strict=True)):
        save(student.model, args.out / (f"draft{index}" if index else "draft"))
        drafts.append(plain_copy(args, student.model, draft_shape(args, spec)[0], data.eos))
    return drafts


def main() -> None:
    args = parse_arguments(__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.recompile_limit = 64
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    log = JsonLog(args.out / "training_log.jsonl")
    log("arguments", torch=torch.__version__, **{name: str(value) for name, value in vars(args).items()})
    data = prepare_data(args, log)
    target, companion = load_pair(args) if args.from_pair else make_target(args, data, log)
    if args.samples_only:
        torch.save(make_samples(args, data, target, log).to(torch.int32).cpu(), args.out / SAMPLES_FILE)
        return
    drafts = [] if args.target_only else make_drafts(args, data, target, companion, log)
    if not args.measure:
        return
    torch.set_float32_matmul_precision("highest")
    report, greedy = measure(target, drafts, data.heldout_prompts, data.eos)
    log("measures", **report)
    for row, start in list(zip(greedy.ids.tolist(), greedy.starts.tolist(), strict=True))[:4]:
        log("sample", prompt=data.tokenizer.decode(row[:start]), greedy=data.tokenizer.decode(row[start:]))


if __name__ == "__main__":
    main()
