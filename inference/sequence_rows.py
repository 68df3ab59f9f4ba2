"""The sampling rows of one sequence: what its parameters mean for the token at each position.

Penalties, bad words and the ban on early stop tokens depend on the tokens before a position. A row may lie ahead of
what is committed: with ``ahead`` the drafted tokens before it, it is the row that plain decoding would have there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from inference.adjustment import Adjustment, Penalties, SeenTokens
from inference.sampling import SamplingRow

_FIRST_CAPACITY = 256


class SamplingParameters(Protocol):
    """How a sequence is sampled; ``Sampling`` in ``common.proto`` says what each means. All are within their ranges."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def logit_bias(self) -> Sequence[tuple[int, float]]: ...
    @property
    def bad_words(self) -> Sequence[tuple[int, ...]]: ...
    @property
    def min_length(self) -> int: ...


class SequenceRows:
    """Makes the rows of one sequence. Rows without rules cost nothing: they are one object."""

    def __init__(
        self, parameters: SamplingParameters, prompt_length: int, stop_token_ids: Sequence[int], limit: int
    ) -> None:
        """Positions from ``prompt_length`` on are output; ``stop_token_ids`` are not drawn before ``min_length``.

        Only ids below ``limit`` are drawn: what is said of others has no effect.
        """
        self._plain = SamplingRow(
            temperature=parameters.temperature,
            top_k=parameters.top_k,
            top_p=parameters.top_p,
            seed=parameters.seed,
            min_p=parameters.min_p,
        )
        biases = {token_id: bias for token_id, bias in parameters.logit_bias if token_id < limit}
        self._bias_token_ids, self._biases = list(biases), list(biases.values())
        self._bad_words = [(word[:-1], word[-1]) for word in parameters.bad_words if word and word[-1] < limit]
        self._longest_start = max((len(start) for start, _ in self._bad_words), default=0)
        self._prompt_length = prompt_length
        self._min_length = parameters.min_length
        self._stop_token_ids = [token_id for token_id in stop_token_ids if token_id < limit]
        self._penalties = Penalties(
            parameters.repetition_penalty, parameters.presence_penalty, parameters.frequency_penalty
        )
        self._counts = None if self._penalties.is_off else _TokenCounts(prompt_length)
        self._has_rules = bool(self._bias_token_ids or self._bad_words or self._counts)

    @property
    def fixed(self) -> SamplingRow | None:
        """The row at every position; None if rows depend on the tokens before them."""
        return None if self._has_rules or self._min_length else self._plain

    def rows(self, committed: Sequence[int], drafted: Sequence[int]) -> list[SamplingRow]:
        """The rows after ``committed + drafted[:i]`` for each ``i`` in ``[0, len(drafted)]``."""
        if not self._has_rules and len(committed) >= self._min_length:
            return [self._plain] * (len(drafted) + 1)
        return [self.row(committed, drafted[:index]) for index in range(len(drafted) + 1)]

    def row(self, committed: Sequence[int], ahead: Sequence[int]) -> SamplingRow:
        """The row after ``committed + ahead``. From call to call ``committed`` only grows."""
        banned = self._banned(committed, ahead)
        if not banned and not self._has_rules:
            return self._plain
        adjustment = Adjustment(
            banned=banned,
            bias_token_ids=self._bias_token_ids,
            biases=self._biases,
            penalties=self._penalties,
            seen=None if self._counts is None else self._counts.seen(committed, ahead),
        )
        return self._plain.with_adjustment(adjustment)

    def _banned(self, committed: Sequence[int], ahead: Sequence[int]) -> list[int]:
        banned = self._stop_token_ids if len(committed) + len(ahead) < self._min_length else []
        if not self._bad_words:
            return banned
        start = max(self._prompt_length, len(committed) - self._longest_start)
        tail = (*committed[start:], *ahead)
        return [*banned, *(last for start_, last in self._bad_words if _ends_in(tail, start_))]


def _ends_in(token_ids: tuple[int, ...], ending: tuple[int, ...]) -> bool:
    return not ending or token_ids[-len(ending) :] == ending


class _TokenCounts:
    """The distinct tokens of a sequence and how often each is in its output, at O(1) for each committed token."""

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length
        self._num_counted = 0
        self._column_of: dict[int, int] = {}
        self._token_ids = np.empty(_FIRST_CAPACITY, np.int64)
        self._num_in_output = np.empty(_FIRST_CAPACITY, np.float32)

    def seen(self, committed: Sequence[int], ahead: Sequence[int]) -> SeenTokens:
        for token_id in committed[self._num_counted :]:
            self._count(token_id)
        num_distinct = len(self._column_of)
        extra = {token_id: 0 for token_id in ahead if token_id not in self._column_of}
        columns = {token_id: num_distinct + index for index, token_id in enumerate(extra)}
        token_ids = np.concatenate([self._token_ids[:num_distinct], np.fromiter(extra, np.int64, len(extra))])
        num_in_output = np.concatenate([self._num_in_output[:num_distinct], np.zeros(len(extra), np.float32)])
        for token_id in ahead:
            num_in_output[columns[token_id] if token_id in columns else self._column_of[token_id]] += 1
        return SeenTokens(token_ids, num_in_output)

    def _count(self, token_id: int) -> None:
        column = self._column_of.get(token_id)
        if column is None:
            column = self._column_of[token_id] = len(self._column_of)
            if column == len(self._token_ids):
                self._token_ids = np.resize(self._token_ids, 2 * column)
                self._num_in_output = np.resize(self._num_in_output, 2 * column)
            self._token_ids[column], self._num_in_output[column] = token_id, 0
        self._num_in_output[column] += self._num_counted >= self._prompt_length
        self._num_counted += 1
