"""Sessions whose grammar is being compiled: a worker runs the others meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from grammar.compiler import GrammarCompiler
from grammar.errors import GrammarError
from grammar.path import GrammarPath
from speculation.messages import Sampling, TokenId

KeyT = TypeVar("KeyT")
SessionT = TypeVar("SessionT")


class PendingPaths(Generic[KeyT]):
    """What a worker has asked its compiler for. Belongs to one thread."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        """Without a compiler every grammar is refused."""
        self._compiler = compiler
        self._futures: dict[KeyT, Future[GrammarPath]] = {}

    def start(self, key: KeyT, sampling: Sampling, token_ids: Sequence[TokenId]) -> None:
        """Asks for the path of a session that has said ``token_ids``, if it has a grammar."""
        if sampling.grammar is None:
            return
        if self._compiler is None:
            self._futures[key] = Future()
            self._futures[key].set_exception(GrammarError("this worker has no compiler of grammars"))
        else:
            self._futures[key] = self._compiler.start(
                sampling.grammar, token_ids, sampling.prompt_length or len(token_ids)
            )

    def drop(self, key: KeyT) -> None:
        """The session is gone. Unknown keys are ignored."""
        future = self._futures.pop(key, None)
        if future is not None:
            future.cancel()

    def take(self) -> list[tuple[KeyT, GrammarPath | GrammarError]]:
        """What is ready now, or has failed; each is told once."""
        done = [key for key, future in self._futures.items() if future.done()]
        return [(key, _result(self._futures.pop(key))) for key in done]

    def without(self, sessions: dict[KeyT, SessionT]) -> Collection[SessionT]:
        """The sessions that wait for no grammar."""
        if not self._futures:
            return sessions.values()
        return [session for key, session in sessions.items() if key not in self._futures]


def _result(future: Future[GrammarPath]) -> GrammarPath | GrammarError:
    try:
        return future.result()
    except GrammarError as error:
        return error
    except Exception as error:  # a defect of the library is this request's misfortune, not the worker's
        return GrammarError(f"cannot be compiled: {error!r}")
