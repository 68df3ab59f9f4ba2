"""From what a request says to what the library compiles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from grammar.errors import GrammarError, shown
from speculation.messages import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_CHARS = 1 << 16
"""Of a grammar's text. The library's own limits bound what can be made of so many."""

MAX_MULTIPLE = 100_000
"""Of all different ``multipleOf`` of a schema multiplied. Their automaton may have that many states, and nothing in the
library limits it: 97, 89 and 83 together took 49 s and 300 MB."""

_JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write a value, that of Python's ``json.dumps``: free whitespace is something that a model can go on with
for ever, and a choice at which a drafter can be wrong."""


def library_grammar(grammar: Grammar) -> str:
    """The library's own form. Raises `GrammarError`; what that form says is checked when it is compiled."""
    if len(grammar.text) > MAX_CHARS:
        raise GrammarError(f"has {len(grammar.text)} characters; at most {MAX_CHARS}")
    translate = _KINDS.get(grammar.kind)
    if translate is None:
        raise GrammarError(f"kind {shown(repr(grammar.kind))} is unknown; must be one of {', '.join(_KINDS)}")
    return translate(grammar.text)


def _json_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"is not JSON: {shown(str(error))}") from None
    if not isinstance(schema, dict):
        raise GrammarError("is no JSON schema that says anything: that is an object")
    _check_multiples(schema)
    return _of_schema(text)


def _of_schema(text: str) -> str:
    try:
        return str(LLMatcher.grammar_from_json_schema(text, overrides=_JSON_STYLE))
    except ValueError as error:
        raise GrammarError(shown(str(error))) from None


def _check_multiples(schema: object) -> None:
    product = 1
    for factor in set(_multiples(schema)):
        product *= factor
    if product > MAX_MULTIPLE:
        raise GrammarError(f"multipleOf: all of them multiplied make {product}; at most {MAX_MULTIPLE}")


def _multiples(schema: object) -> Iterator[int]:
    """The digits of each ``multipleOf``, without the zeros around them."""
    if isinstance(schema, list):
        for item in schema:
            yield from _multiples(item)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key == "multipleOf" and isinstance(value, int | float):
                digits = Decimal(str(value)).normalize().as_tuple().digits
                yield int("".join(map(str, digits)) or "0") or 1
            yield from _multiples(value)


def _json_object(text: str) -> str:
    if text:
        raise GrammarError("a JSON object takes no text; use json_schema to say what is in it")
    return _of_schema('{"type": "object"}')


def _regex(text: str) -> str:
    return str(LLMatcher.grammar_from_regex(text))


def _ebnf(text: str) -> str:
    """GBNF, as of llama.cpp and xgrammar (``root ::= ...``), or Lark (``start: ...``)."""
    try:
        return str(LLMatcher.grammar_from_lark(any_to_lark(text)))
    except GbnfToLarkError as error:
        raise GrammarError(f"is no EBNF: {shown(str(error))}") from None
    except RecursionError:
        raise GrammarError("is no EBNF that can be read: its parentheses are too deep") from None
    except Exception as error:  # the library's converter raises bare ones for undefined rules
        raise GrammarError(f"is no EBNF: {shown(str(error))}") from None


_KINDS: Mapping[str, Callable[[str], str]] = {
    "json_schema": _json_schema,
    "json_object": _json_object,
    "regex": _regex,
    "ebnf": _ebnf,
}
