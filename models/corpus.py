"""The corpus of the demo pair: the running Python's own standard library, and the tokenizer made from it.

Some files are held out by a hash of their path, so the rule is the same for every Python version. Held-out files
train nothing: not the tokenizer, not the target, not the draft. They give the held-out loss and the benchmark prompts.
"""

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"
HELD_OUT_SHARE = 1 / 24
NUM_PROMPTS = 64
PROMPT_CHARS = (150, 500)

# Tests, bundled packages, and tables made by programs rather than written by people.
EXCLUDED_DIRS = {
    "__phello__", "_bundled", "config", "dist-packages", "encodings", "idle_test", "lib-dynload", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
EXCLUDED_FILES = {"html/entities.py", "lib2to3/pgen2/grammar.py", "stringprep.py", "this.py"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the standard library: path relative to its root, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def read_library(root: Path | None = None, max_files: int | None = None) -> list[SourceFile]:
    """Every usable module of the standard library under `root` (default: the running Python's), in path order."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = {part.split("-")[0] if part.startswith("config-") else part for part in relative.parts[:-1]}
        if folders & EXCLUDED_DIRS or relative.as_posix() in EXCLUDED_FILES or path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if text.strip():
            files.append(SourceFile(relative.as_posix(), text))
    return files[:: max(1, len(files) // max_files)] if max_files else files


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with exactly `vocab_size` entries, id 0 being EOS. Lossless for any UTF-8 text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} entries, not {vocab_size}: use more files")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and a config that transformers 4 and 5 both read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode_files(tokenizer: Tokenizer, files: Sequence[SourceFile], seed: int) -> torch.Tensor:
    """All files in a shuffled order as one stream of ids, each file ended by EOS. Shape [tokens], int64."""
    shuffled = random.Random(seed).sample(list(files), len(files))
    eos = tokenizer.token_to_id(EOS)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([file.text for file in shuffled]):
        ids += [*encoding.ids, eos]
    return torch.tensor(ids)


def windows(ids: torch.Tensor, length: int, offset: int = 0) -> torch.Tensor:
    """The stream from `offset` cut into rows. Shape [rows, length]."""
    count = (len(ids) - offset) // length
    return ids[offset : offset + count * length].view(count, length)


def batches(ids: torch.Tensor, length: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Shuffled rows without end, [rows, length] each; every pass over the stream cuts it at another offset."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(min(length, len(ids) - rows * length), (1,), generator=rng))
        cut = windows(ids, length, offset)
        order = torch.randperm(len(cut), generator=rng).to(cut.device)
        for start in range(0, len(order) - rows + 1, rows):
            yield cut[order[start : start + rows]]


def cut_prompts(files: Sequence[SourceFile], count: int, seed: int) -> list[str]:
    """Prompts of 150 to 500 characters that begin at a line's start and end where a user's would: at the end of a
    line, or after a word inside one, never in leading or trailing blanks."""
    rng = random.Random(seed)
    lengths = [len(file.text) for file in files]
    prompts: list[str] = []
    while len(prompts) < count:
        text = rng.choices(files, lengths)[0].text
        start = text.rfind("\n", 0, rng.randrange(len(text))) + 1
        stop = start + rng.randint(*PROMPT_CHARS)
        prompt = text[start:stop]
        cut = prompt.rfind("\n" if rng.random() < 0.5 else " ")
        prompt = prompt[:cut].rstrip()
        if stop <= len(text) and PROMPT_CHARS[0] <= len(prompt):
            prompts.append(prompt)
    return prompts


def cut_rows(tokenizer: Tokenizer, files: Sequence[SourceFile], count: int, length: int, seed: int) -> torch.Tensor:
    """Rows of text that begin as prompts do, at a line's start. Shape [count, length]."""
    rng = random.Random(seed)
    roomy = [file for file in files if len(file.text) > 16 * length] or list(files)
    sizes = [len(file.text) for file in roomy]
    rows: list[list[int]] = []
    while len(rows) < count:
        texts = []
        for file in rng.choices(roomy, sizes, k=count - len(rows)):
            start = file.text.rfind("\n", 0, rng.randrange(len(file.text))) + 1
            texts.append(file.text[start : start + 16 * length])
        encoded = [encoding.ids[:length] for encoding in tokenizer.encode_batch(texts)]
        rows += [ids for ids in encoded if len(ids) == length]
    return torch.tensor(rows)


def write_heldout_prompts(path: Path, source: str, prompts: Sequence[str]) -> None:
    """The benchmark prompts as JSON: {"source": ..., "prompts": [...]}."""
    path.write_text(json.dumps({"source": source, "prompts": list(prompts)}, indent=1, ensure_ascii=False) + "\n")
