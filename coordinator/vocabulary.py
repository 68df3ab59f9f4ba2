"""Do two models mean the same by a token id?

Compared by token string, not by size or digest alone: two files of the same vocabulary may differ in bytes, two
vocabularies of the same size may differ in meaning. Ids that only one side knows (a padded tail, extra added tokens at
the end) are fine: the target never draws an id that its tokenizer lacks, and one that the draft model lacks is merely
never drafted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from tokenizers import Tokenizer

from rpc.errors import ModelMismatch
from speculation.messages import ModelInfo

MAX_NAMED_DIFFERENCES = 3


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A worker's model and its tokenizer."""

    info: ModelInfo
    tokenizer_json: bytes
    tokenizer: Tokenizer
    longest_token_chars: int = 0
    """A text of more than so many characters per token of context cannot fit; 0 if that is not known."""


def load_served_model(info: ModelInfo, tokenizer_json: bytes) -> ServedModel:
    """Parses the tokenizer. Raises `ModelMismatch` if it is none."""
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
        return ServedModel(info, tokenizer_json, tokenizer, max(map(len, tokenizer.get_vocab()), default=0))
    except Exception as error:  # the library raises bare Exception, or ValueError
        raise ModelMismatch(
            f"the tokenizer of {info.name!r} cannot be read ({error}); serve a model with a tokenizer.json"
        ) from error


def check_same_vocabulary(model: ServedModel, other: ServedModel) -> None:
    """Raises `ModelMismatch` naming the first ids that mean different tokens to the two models."""
    if model.info.tokenizer_sha256 == other.info.tokenizer_sha256 and model.tokenizer_json == other.tokenizer_json:
        return
    ours, theirs = token_strings(model.tokenizer), token_strings(other.tokenizer)
    shared = sorted(ours.keys() & theirs.keys())
    differing = (id_ for id_ in shared if ours[id_] != theirs[id_])
    named = [f"id {id_} is {ours[id_]!r} / {theirs[id_]!r}" for id_ in islice(differing, MAX_NAMED_DIFFERENCES)]
    if named or not shared:
        found = ", ".join(named) or "no token id in common"
        raise ModelMismatch(
            f"{model.info.name!r} and {other.info.name!r} have different vocabularies: {found}; "
            "use a draft model that was trained with the target's tokenizer"
        )


def token_strings(tokenizer: Tokenizer) -> Mapping[int, str]:
    """Token id to token string, added tokens included."""
    return {id_: token for token, id_ in tokenizer.get_vocab(with_added_tokens=True).items()}
