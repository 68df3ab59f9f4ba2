"""Is what a request wants its answer to look like possible at all? Found out before any worker hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future

from coordinator.vocabulary import ServedModel
from grammar import GrammarCompiler, GrammarError, GrammarPath
from rpc.errors import FieldViolation, InvalidRequest, Overloaded
from speculation.messages import Grammar

FIELD = "structured_output"

FIELDS: Mapping[str, str] = {
    "json_schema": f"{FIELD}.json_schema",
    "json_object": f"{FIELD}.json_object",
    "regex": f"{FIELD}.regex",
    "ebnf": f"{FIELD}.grammar",
}
"""The client's name of each kind of grammar."""

MAX_COMPILE_S = 5.0
"""A grammar that takes longer is refused. The library's limits end nearly all of those much earlier."""


class GrammarCheck:
    """Compiles grammars for the tokenizer of the model that is served; those seen lately it knows."""

    def __init__(self, model: ServedModel, max_compile_s: float = MAX_COMPILE_S) -> None:
        info = model.info
        self._compiler = GrammarCompiler(model.tokenizer_json.decode(), info.tokenizer_size, info.eos_token_ids)
        self._max_compile_s = max_compile_s

    async def check(self, grammar: Grammar) -> None:
        """Raises `InvalidRequest` naming the field and what is wrong, `Overloaded` if its turn does not come."""
        field = FIELDS.get(grammar.kind, FIELD)
        future = self._compiler.start(grammar, (), 0)
        try:
            await asyncio.wait_for(asyncio.wrap_future(future), self._max_compile_s)
        except GrammarError as error:
            raise InvalidRequest(FieldViolation(field, str(error))) from None
        except TimeoutError:
            raise self._too_long(field, future) from None

    def _too_long(self, field: str, future: Future[GrammarPath]) -> InvalidRequest | Overloaded:
        if future.cancelled():  # its turn never came
            return Overloaded("the grammars of other requests are still being compiled; try again later")
        problem = f"is not compiled after {self._max_compile_s:g} s; make it smaller or less ambiguous"
        return InvalidRequest(FieldViolation(field, problem))

    def close(self) -> None:
        """Begins nothing more. Idempotent."""
        self._compiler.close()
