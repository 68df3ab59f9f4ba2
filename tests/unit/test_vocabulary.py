"""Two models agree on the vocabulary by token string; a padded tail does not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, models

from coordinator.vocabulary import ServedModel, check_same_vocabulary, load_served_model
from rpc.errors import ModelMismatch
from speculation.messages import ModelInfo


def served(name: str, tokens: Sequence[str], added: Sequence[str] = ()) -> ServedModel:
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.add_special_tokens(list(added))
    data = tokenizer.to_str().encode()
    size = len(tokens) + len(added)
    info = ModelInfo(name, size, 128, (), 1, "float32", "cpu", hashlib.sha256(data).digest(), size)
    return load_served_model(info, data)


TARGET = served("big", ["<unk>", "a", "b", "c"])


@pytest.mark.parametrize(
    "draft",
    [
        pytest.param(served("small", ["<unk>", "a", "b", "c"]), id="equal"),
        pytest.param(served("small", ["<unk>", "a", "b", "c"], added=["<pad>"]), id="longer tail"),
        pytest.param(served("small", ["<unk>", "a", "b"]), id="shorter"),
        pytest.param(served("small", ["<unk>", "a", "b"], added=["c"]), id="same token, other kind"),
    ],
)
def test_agreeing_vocabularies(draft: ServedModel) -> None:
    check_same_vocabulary(TARGET, draft)
    check_same_vocabulary(draft, TARGET)


def test_swapped_tokens_of_equal_size_are_named() -> None:
    with pytest.raises(ModelMismatch) as caught:
        check_same_vocabulary(TARGET, served("small", ["<unk>", "b", "a", "c"]))

    for part in ("'big'", "'small'", "id 1 is 'a' / 'b'", "id 2 is 'b' / 'a'", "use a draft model"):
        assert part in caught.value.message
    assert "id 3" not in caught.value.message


def test_only_the_first_few_of_many_are_named() -> None:
    with pytest.raises(ModelMismatch) as caught:
        check_same_vocabulary(
            served("big", [f"x{index}" for index in range(100)]), served("small", [f"y{index}" for index in range(100)])
        )
    assert caught.value.message.count("id ") == 3


def test_a_shifted_added_token_is_found() -> None:
    with pytest.raises(ModelMismatch, match="id 4 is '<a>' / '<b>'"):
        check_same_vocabulary(
            served("big", ["<unk>", "a", "b", "c"], added=["<a>", "<b>"]),
            served("small", ["<unk>", "a", "b", "c"], added=["<b>", "<a>"]),
        )


def test_a_file_that_is_no_tokenizer_is_a_clear_error() -> None:
    with pytest.raises(ModelMismatch, match=r"'big'.*tokenizer\.json"):
        load_served_model(TARGET.info, b"{}")
