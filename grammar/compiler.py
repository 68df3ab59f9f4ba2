"""Makes paths, on threads of its own: a hard grammar takes tenths of a second, and a step waits for nobody."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from grammar.errors import GrammarError, shown
from grammar.path import GrammarPath, allowed_by
from grammar.source import library_grammar
from speculation.messages import Grammar, TokenId

MAX_KEPT = 64
"""Compiled grammars that are kept. A usual one takes some 100 KB, the largest some 10 MB."""

_NUM_THREADS = 2

_MAX_LEXER_STATES = 50_000
"""1 to 2 KB each: bounds the memory of one grammar."""


class GrammarCompiler:
    """Compiles for one tokenizer. Callable from any thread; starts none and reads no tokenizer before it is used."""

    def __init__(self, tokenizer_json: str, num_tokens: int, end_token_ids: Sequence[TokenId]) -> None:
        """The model draws no token at ``num_tokens`` or beyond; complete answers end with one of ``end_token_ids``."""
        self._tokenizer_json = tokenizer_json
        self._num_tokens = num_tokens
        self._end_token_ids = frozenset(end_token_ids)
        self._limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = Lock()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self.on_done: Callable[[], None] = lambda: None
        """Called on a thread of the compiler whenever a path is ready, or failed to be."""

    def start(self, grammar: Grammar, token_ids: Sequence[TokenId], prompt_length: int) -> Future[GrammarPath]:
        """A path behind ``token_ids``, the answer in which begins at ``prompt_length``; or `GrammarError`."""
        future = self._threads.submit(self.compile, grammar, token_ids, prompt_length)
        future.add_done_callback(lambda _: self.on_done())
        return future

    def compile(self, grammar: Grammar, token_ids: Sequence[TokenId], prompt_length: int) -> GrammarPath:
        """As `start`, on the caller's thread. Raises `GrammarError`."""
        path = GrammarPath(self._matcher(grammar), self._end_token_ids, prompt_length)
        path.follow(token_ids)
        return path

    def close(self) -> None:
        """Drops what has not begun. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        """A copy of the one that is kept: it shares nothing, but what that one has learned of its automaton."""
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
                return kept.deep_copy()
        made = self._make(grammar)
        with self._lock:
            self._kept[grammar] = made.deep_copy()
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return made

    def _make(self, grammar: Grammar) -> LLMatcher:
        source = library_grammar(grammar)
        matcher = LLMatcher(self._vocabulary, source, log_level=0, limits=self._limits)
        allowed_by(matcher)  # raises, and makes the first part of the automaton
        return matcher

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        if not self._end_token_ids:
            raise GrammarError("cannot be had: the model has no end-of-text token that could end the answer")
        try:
            return self._read_tokenizer()
        except Exception as error:  # whatever the library makes of a tokenizer it does not know
            raise GrammarError(f"cannot be had with this model's tokenizer: {shown(str(error))}") from error

    def _read_tokenizer(self) -> LLTokenizer:
        end_token_ids = sorted(self._end_token_ids)
        try:
            return LLTokenizer(self._tokenizer_json, n_vocab=self._num_tokens, eos_token=end_token_ids)
        except ValueError:  # it has more tokens than the model; whoever draws never draws those
            return LLTokenizer(self._tokenizer_json, eos_token=end_token_ids)
