"""What is allowed depends on the grammar and the tokens alone, however a path got there."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from grammar import GrammarCompiler, GrammarError, GrammarPath, Mask
from speculation.messages import Grammar
from tests.doubles import grammars
from tests.doubles.tiny_models import byte_level_tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: a space is U+2581, what has no token is spelled in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*'abcdefghijklmnopqrstuvwxyz0123456789+-_()[]{}:,"', "▁", "▁+", "def", '"name', '": ', "re", "en"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("r", "e"), ("e", "n"), ("▁", "+")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return tokenizer


TOKENIZERS = {"byte-level": (byte_level_tokenizer(), 0), "sentencepiece": (sentencepiece_tokenizer(), 2)}


def tokens_of(mask: Mask, num_tokens: int) -> list[int]:
    assert mask is not None
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    assert not bits[num_tokens:].any(), "a token beyond the vocabulary is allowed"
    return np.flatnonzero(bits).tolist()


def answer_of(path: GrammarPath, num_tokens: int, eos: int, rng: random.Random, prompt: Sequence[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < 300:
        path.follow([*prompt, *answer])
        answer.append(rng.choice(tokens_of(path.mask(()), num_tokens)))
        if answer[-1] == eos:
            return answer
    raise AssertionError("the grammar does not come to an end")


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("grammar", grammars.GRAMMARS, ids=lambda grammar: grammar.kind)
def test_any_choice_of_what_is_allowed_fits(kind: str, grammar: Grammar) -> None:
    tokenizer, eos = TOKENIZERS[kind]
    size = tokenizer.get_vocab_size()
    compiler = GrammarCompiler(tokenizer.to_str(), size, [eos])
    for seed in range(25):
        prompt = [5] * (seed % 3 + 1)
        path = compiler.compile(grammar, prompt, len(prompt))
        answer = answer_of(path, size, eos, random.Random(seed), prompt)
        assert grammars.fits(grammar, tokenizer.decode(answer[:-1]))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("grammar", grammars.GRAMMARS, ids=lambda grammar: grammar.kind)
def test_masks_are_those_of_a_matcher_that_never_looked_ahead(kind: str, grammar: Grammar) -> None:
    tokenizer, eos = TOKENIZERS[kind]
    size = tokenizer.get_vocab_size()
    compiler = GrammarCompiler(tokenizer.to_str(), size, [eos])
    allowed = grammars.from_scratch(grammar, tokenizer.to_str(), size, [eos])
    rng = random.Random(1)
    prompt = [7, 8, 9]
    for _ in range(6):
        answer = answer_of(compiler.compile(grammar, prompt, 3), size, eos, rng, prompt)
        path, done = compiler.compile(grammar, prompt, 3), 0
        while done < len(answer):
            path.follow([*prompt, *answer[:done]])
            for _ in range(rng.randint(0, 4)):  # drafts that are right for a while, then go their own allowed way
                ahead = answer[done : done + rng.randint(0, 6)]
                if ahead and ahead[-1] != eos:
                    ahead = [*ahead, rng.choice(tokens_of(path.mask(ahead), size))]
                assert path.num_allowed(ahead) == len(ahead)
                masks = path.masks(ahead)
                for length, mask in enumerate(masks):
                    if eos in ahead[:length]:
                        assert mask is None
                    else:
                        expected = np.flatnonzero(allowed([*answer[:done], *ahead[:length]])).tolist()
                        assert tokens_of(mask, size) == expected
            done += rng.randint(1, 4)


def test_a_path_taken_up_in_mid_answer_is_the_same() -> None:
    tokenizer, eos = TOKENIZERS["byte-level"]
    size = tokenizer.get_vocab_size()
    compiler = GrammarCompiler(tokenizer.to_str(), size, [eos])
    for grammar in grammars.GRAMMARS:
        prompt = [1, 2]
        answer = answer_of(compiler.compile(grammar, prompt, 2), size, eos, random.Random(3), prompt)
        path = compiler.compile(grammar, prompt, 2)
        for done in range(len(answer)):
            path.follow([*prompt, *answer[:done]])
            replayed = compiler.compile(grammar, [*prompt, *answer[:done]], 2)
            assert replayed.mask(()) == path.mask(())


def test_what_a_draft_may_be_is_counted() -> None:
    tokenizer, eos = TOKENIZERS["byte-level"]
    compiler = GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size(), [eos])
    path = compiler.compile(Grammar("regex", "[0-9]{2}x?"), [5], 1)
    one, two, x = (tokenizer.encode(text).ids[0] for text in "12x")
    assert path.num_allowed([one, two, x, eos]) == 4
    assert path.num_allowed([one, two, eos, x]) == 3  # nothing follows the end
    assert path.num_allowed([one, eos]) == 1
    assert path.num_allowed([one, x, two]) == 1
    assert path.num_allowed([x]) == path.num_allowed([]) == 0
    assert path.masks([one, two])[0] == path.masks([])[0]


def test_a_complete_answer_may_only_end() -> None:
    tokenizer, eos = TOKENIZERS["byte-level"]
    size = tokenizer.get_vocab_size()
    compiler = GrammarCompiler(tokenizer.to_str(), size, [eos, 4])
    path = compiler.compile(Grammar("regex", "x"), [5, *tokenizer.encode("x").ids], 1)
    assert tokens_of(path.mask(()), size) == [eos, 4]


def test_tokens_of_a_padded_head_are_never_allowed() -> None:
    tokenizer, eos = TOKENIZERS["byte-level"]
    size = tokenizer.get_vocab_size()
    whole = GrammarCompiler(tokenizer.to_str(), size, [eos]).compile(Grammar("regex", "(?s:.*)"), [5], 1).mask(())
    assert len(tokens_of(whole, size)) > size // 2
    smaller = GrammarCompiler(tokenizer.to_str(), size - 40, [eos])  # the head is smaller than the tokenizer
    assert smaller.compile(Grammar("regex", "(?s:.*)"), [5], 1).mask(()) == whole


def test_an_answer_that_breaks_its_grammar_is_refused() -> None:
    tokenizer, eos = TOKENIZERS["byte-level"]
    compiler = GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size(), [eos])
    with pytest.raises(GrammarError, match="position 2 is not allowed"):
        compiler.compile(Grammar("regex", "xy"), [5, *tokenizer.encode("xx").ids], 1)


def test_a_grammar_without_an_end_goes_on_for_ever_or_is_refused() -> None:
    tokenizer, eos = TOKENIZERS["byte-level"]
    compiler = GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size(), [eos])
    path = compiler.compile(Grammar("ebnf", 'root ::= "x" b\nb ::= ("y" | "z") b'), [5], 1)
    x, y, z = tokenizer.encode("xyz").ids
    path.follow([5, x, y, y, y])
    assert tokens_of(path.mask(()), tokenizer.get_vocab_size()) == [y, z]
    forced, committed = compiler.compile(Grammar("ebnf", 'root ::= "x" b\nb ::= "y" b'), [5], 1), [5]
    with contextlib.suppress(GrammarError):
        while len(committed) < 50:
            committed.append(tokens_of(forced.mask(()), tokenizer.get_vocab_size())[0])
            forced.follow(committed)
    assert eos not in committed
