"""Text comes token by token, never half a character, and adds up to what decoding all tokens at once gives."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from coordinator.detokenizer import MAX_HELD_TOKENS, detokenizers

CORPUS = [
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "The quick brown fox, naïve café, Ångström; 🙂🙃 👩‍👩‍👧 日本語のテキスト 中文字符 한국어",
    "\ufffd is a character too\t\x00 and so is \u2028",
]


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<plain text, 日本>", special=False)])
    return Tokenizer.from_str(tokenizer.to_str())


@cache
def llama_style() -> Tokenizer:
    """As Llama 2: Metaspace words, byte fallback, the first space stripped."""
    words = ["▁", "▁Hello", "▁world", "llo", "▁日本", "語", "é", "!", "\n"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocabulary.update({word: 259 + index for index, word in enumerate(words)})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    words = ["▁", "▁Hello", "▁world", "llo", "▁日本", "語"]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def pieces_of(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = detokenizers(tokenizer)()
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def whole(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, byte_level().get_vocab_size() - 1)))
def test_any_byte_level_tokens_add_up(token_ids: list[int]) -> None:
    assert "".join(pieces_of(byte_level(), token_ids)) == whole(byte_level(), token_ids)


@given(st.text())
def test_any_text_comes_back_without_half_characters(text: str) -> None:
    pieces = pieces_of(byte_level(), byte_level().encode(text).ids)

    assert "".join(pieces) == text
    assert pieces[-1] == ""
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", ["🙂", "日本語", "a🙂b", "한"])
def test_a_split_character_comes_with_its_last_token(text: str) -> None:
    single_bytes = [byte_level().token_to_id(char) for char in _as_byte_chars(text)]

    pieces = pieces_of(byte_level(), single_bytes)

    assert [piece for piece in pieces if piece] == list(text)
    assert len(pieces) == len(text.encode()) + 1


def _as_byte_chars(text: str) -> str:
    [(token, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return token


def test_bytes_that_never_become_a_character_are_not_held_back() -> None:
    continuation = byte_level().token_to_id("Ģ")  # byte 0x80
    detokenizer = detokenizers(byte_level())()

    assert [detokenizer.push(continuation) for _ in range(20)] == ["\ufffd"] * 20


def test_an_unfinished_character_is_flushed() -> None:
    first = byte_level().token_to_id("æ")  # byte 0xE6
    assert pieces_of(byte_level(), [first]) == ["", "\ufffd"]


def test_special_and_unknown_tokens_have_no_text() -> None:
    tokenizer = byte_level()
    token_ids = [tokenizer.token_to_id("a"), tokenizer.token_to_id("<eos>"), 10**6, tokenizer.token_to_id("b")]

    assert pieces_of(tokenizer, token_ids) == ["a", "", "", "b", ""]


def _llama_tokens() -> st.SearchStrategy[list[int]]:
    """Words, specials, and bytes of whole characters: what decodes the same whenever it is decoded."""
    character = st.characters(codec="utf-8", min_codepoint=0x80).map(lambda char: [3 + byte for byte in char.encode()])
    word = st.integers(259, 267).map(lambda id_: [id_])
    special = st.integers(0, 2).map(lambda id_: [id_])
    return st.lists(st.one_of(word, character, special)).map(lambda parts: [id_ for part in parts for id_ in part])


@given(_llama_tokens())
@example([242, 194, 192, 242, 194, 192, 227, 163, 131])  # U+FFFD itself, twice, before another character
def test_llama_style_tokens_add_up(token_ids: list[int]) -> None:
    assert "".join(pieces_of(llama_style(), token_ids)) == whole(llama_style(), token_ids)


@given(st.lists(st.integers(0, 5)))
def test_metaspace_tokens_add_up(token_ids: list[int]) -> None:
    assert "".join(pieces_of(metaspace(), token_ids)) == whole(metaspace(), token_ids)


def test_llama_style_byte_tokens_are_held_until_the_character_is_whole() -> None:
    token_ids = [260, *(3 + byte for byte in "🙂".encode()), 261]  # ▁Hello🙂▁world
    assert pieces_of(llama_style(), token_ids) == ["Hello", "", "", "", "🙂", " world", ""]


def test_llama_style_a_replacement_character_spelt_in_bytes_is_not_held_back() -> None:
    assert pieces_of(llama_style(), [260, *(3 + byte for byte in "\ufffd".encode()), 261])[3:5] == ["\ufffd", " world"]


def test_llama_style_wrong_bytes_are_held_for_a_bounded_time() -> None:
    detokenizer = detokenizers(llama_style())()
    pieces = [detokenizer.push(3 + 0x80) for _ in range(MAX_HELD_TOKENS)]

    assert pieces[:-1] == [""] * (MAX_HELD_TOKENS - 1)
    assert pieces[-1] == "\ufffd" * MAX_HELD_TOKENS
    assert detokenizer.push(260) == " Hello"


def test_endless_special_tokens_do_not_slow_it_down() -> None:
    detokenizer = detokenizers(llama_style())()
    assert detokenizer.push(260) == "Hello"
    assert [detokenizer.push(2) for _ in range(1000)] == [""] * 1000
    assert detokenizer.push(261) == " world"
    assert len(detokenizer._window) <= 2  # type: ignore[attr-defined]
