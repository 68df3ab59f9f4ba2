"""Grammars that short answers fit into, and what they allow, asked of the library from the start every time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

import jsonschema
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from grammar.source import library_grammar
from speculation.messages import Grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6, "pattern": "^[a-z ]*$"},
        "size": {"type": "integer", "minimum": -20, "maximum": 300},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
REGEX = r"(def|class) [a-z_]{1,12}(\([a-z]?\))?:"
GBNF = """
root ::= sum "\\n"
sum ::= term (" + " term){0,3}
term ::= [0-9]{1,3} | "(" sum ")"
"""
GRAMMARS = (Grammar("json_schema", json.dumps(SCHEMA)), Grammar("regex", REGEX), Grammar("ebnf", GBNF))


def fits(grammar: Grammar, text: str) -> bool:
    """By another program than the one that made the masks; of EBNF only what a regular expression can see."""
    if grammar.kind == "json_schema":
        jsonschema.validate(json.loads(text), json.loads(grammar.text))
        return True
    pattern = grammar.text if grammar.kind == "regex" else r"[0-9()]+( \+ [0-9()]+)*\n"
    return re.fullmatch(pattern, text) is not None


def from_scratch(
    grammar: Grammar, tokenizer_json: str, vocab_size: int, eos: Sequence[int] = (0,)
) -> Callable[[Sequence[int]], np.ndarray]:
    """What may follow an answer: bool [V]. A new matcher consumes the whole answer for every question."""
    tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos))
    source = library_grammar(grammar)

    def allowed(answer: Sequence[int]) -> np.ndarray:
        matcher = LLMatcher(tokenizer, source, log_level=0)
        assert matcher.consume_tokens(list(answer)), matcher.get_error()
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=vocab_size, bitorder="little").astype(bool)

    return allowed
