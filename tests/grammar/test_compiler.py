"""Bad grammars are refused in words, hard ones within bounds, and the threads leave nobody waiting."""

from __future__ import annotations

import json
import threading
import time

import pytest

from grammar import GrammarCompiler, GrammarError, GrammarPath, PendingPaths
from grammar.compiler import MAX_KEPT
from grammar.source import MAX_CHARS
from speculation.messages import Grammar, Sampling
from tests.doubles import grammars
from tests.doubles.tiny_models import VOCAB_SIZE, byte_level_tokenizer

TOKENIZER_JSON = byte_level_tokenizer().to_str()


@pytest.fixture
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER_JSON, VOCAB_SIZE, [0])


def schema(**keywords: object) -> Grammar:
    return Grammar("json_schema", json.dumps(keywords))


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        (Grammar("json_schema", '{"type": '), "is not JSON"),
        (Grammar("json_schema", ""), "is not JSON"),
        (Grammar("json_schema", "[1]"), "is no JSON schema"),
        (Grammar("json_schema", "[" * 60_000), "is not JSON"),
        (Grammar("json_schema", '{"items": ' * 5_000 + "{}" + "}" * 5_000), "is not JSON|recursion"),
        (schema(type="nope"), "nope"),
        (schema(type="object", properties=3), "properties"),
        (Grammar("json_schema", "false"), "is no JSON schema"),
        ({"$ref": "#/definitions/none"}, "/definitions/none"),
        ({"$ref": "https://example.com/x.json"}, "https://example.com/x.json"),
        (schema(type="string", pattern="("), "regex"),
        (schema(type="integer", minimum=3, maximum=1), "(?i)minimum|unsatisfiable"),
        (Grammar("regex", "(abc"), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look"),
        (Grammar("regex", "(" * 20_000 + "a" + ")" * 20_000), "regex"),
        (Grammar("ebnf", ""), "root"),
        (Grammar("ebnf", "root ::= foo"), "foo"),
        (Grammar("ebnf", 'root ::= "a'), "EBNF"),
        (Grammar("ebnf", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000), "too deep"),
        (Grammar("ebnf", "start: <|nothing|>"), "unknown special token"),
        (Grammar("json_object", "{}"), "takes no text"),
        (Grammar("lark", "x"), "'lark' is unknown"),
        (Grammar("", ""), "unknown"),
        (Grammar("regex", "a" * (MAX_CHARS + 1)), f"at most {MAX_CHARS}"),
    ],
)
def test_what_is_wrong_is_said_in_one_short_line(
    compiler: GrammarCompiler, grammar: Grammar | dict[str, str], problem: str
) -> None:
    if isinstance(grammar, dict):
        grammar = schema(**grammar)
    with pytest.raises(GrammarError, match=problem) as caught:
        compiler.compile(grammar, [5], 1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "grammar",
    [
        schema(type="integer", multipleOf=999_983),
        schema(allOf=[{"type": "integer", "multipleOf": factor} for factor in (97, 89, 83)]),
        schema(allOf=[{"anyOf": [{"pattern": f"a{i}.*"}, {"pattern": f".*b{i}"}]} for i in range(12)]),
        schema(type="object", properties={f"v{i}": {"type": "integer"} for i in range(1800)}),
        schema(type="string", maxLength=10_000_000),
        schema(type="array", maxItems=10_000, items={"type": "array", "maxItems": 10_000, "items": {"type": "number"}}),
        schema(enum=[f"value {i}" for i in range(3_000)]),
        Grammar("regex", "(a|b)*a(a|b){500}"),
        Grammar("regex", "((a{0,100}b{0,100}){0,100}c){0,100}"),
        Grammar("regex", "|".join(f"(x{i}y*)+{i}" for i in range(4_000))),
        Grammar("ebnf", "root ::= " + " ".join(["a"] * 3_000) + '\na ::= "x"? "y"? "z"?'),
        Grammar("ebnf", 'root ::= root root | "a"'),
    ],
    ids=lambda grammar: grammar.text[:30],
)
def test_a_grammar_that_explodes_is_bounded(compiler: GrammarCompiler, grammar: Grammar) -> None:
    start_s = time.monotonic()
    try:
        path = compiler.compile(grammar, [5], 1)
        path.mask(())
    except GrammarError:
        pass
    assert time.monotonic() - start_s < 10  # 0.7 s at most on the machine where this was written


def test_without_an_end_of_text_token_no_answer_could_end() -> None:
    with pytest.raises(GrammarError, match="no end-of-text token"):
        GrammarCompiler(TOKENIZER_JSON, VOCAB_SIZE, []).compile(Grammar("regex", "x"), [5], 1)


def test_a_tokenizer_that_the_library_does_not_know_is_refused() -> None:
    with pytest.raises(GrammarError, match="this model's tokenizer"):
        GrammarCompiler("{}", VOCAB_SIZE, [0]).compile(Grammar("regex", "x"), [5], 1)


def test_the_number_kept_is_bounded(compiler: GrammarCompiler) -> None:
    for number in range(MAX_KEPT + 10):
        compiler.compile(Grammar("regex", f"x{{{number + 1}}}"), [5], 1)
    assert len(compiler._kept) == MAX_KEPT
    assert Grammar("regex", "x{1}") not in compiler._kept


def test_paths_of_one_grammar_do_not_disturb_each_other(compiler: GrammarCompiler) -> None:
    first, second = (compiler.compile(grammars.GRAMMARS[0], [5], 1) for _ in range(2))
    opening = first.mask(())
    first.follow([5, *byte_level_tokenizer().encode('{"name').ids])
    assert first.mask(()) != opening
    assert second.mask(()) == opening


class GatedCompiler(GrammarCompiler):
    """Compiles when it is let."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER_JSON, VOCAB_SIZE, [0])
        self.gate = threading.Event()

    def compile(self, *arguments: object) -> GrammarPath:
        assert self.gate.wait(30)
        return super().compile(*arguments)  # type: ignore[arg-type]


def test_pending_paths_hold_their_sessions_only() -> None:
    compiler, done = GatedCompiler(), threading.Event()
    compiler.on_done = done.set
    pending: PendingPaths[str] = PendingPaths(compiler)
    sessions = {"free": 1, "bound": 2}
    pending.start("free", Sampling(), [5])
    pending.start("bound", Sampling(prompt_length=1, grammar=Grammar("regex", "x")), [5])
    assert (list(pending.without(sessions)), pending.take()) == ([1], [])
    compiler.gate.set()
    assert done.wait(30)
    [(key, path)] = pending.take()
    assert key == "bound"
    assert isinstance(path, GrammarPath)
    assert list(pending.without(sessions)) == [1, 2]


def test_pending_paths_tell_of_errors_and_forget_who_is_gone() -> None:
    compiler, done = GatedCompiler(), threading.Semaphore(0)
    compiler.on_done = done.release
    pending: PendingPaths[str] = PendingPaths(compiler)
    for key in ("bad", "gone"):
        pending.start(key, Sampling(prompt_length=1, grammar=Grammar("regex", "(")), [5])
    pending.drop("gone")
    compiler.gate.set()
    assert done.acquire(timeout=30)
    assert done.acquire(timeout=30)
    assert [(key, type(result)) for key, result in pending.take()] == [("bad", GrammarError)]
    none: PendingPaths[str] = PendingPaths(None)
    none.start("any", Sampling(prompt_length=1, grammar=Grammar("regex", "x")), [5])
    assert [type(result) for _, result in none.take()] == [GrammarError]
