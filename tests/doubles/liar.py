"""A draft link behind which somebody lies about what tokens were drawn from, in every way the wire has room for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from coordinator.clients import DraftClient, DraftConnection, OnLost
from rpc.draft_codec import DraftFrame, draft_frame_from_proto, draft_frame_to_proto
from speculation.draft_distribution import WEIGHT_TOTAL, DraftDistribution
from speculation.messages import DraftEvent, ModelInfo, Proposal, SessionId

_HUGE = 2**32 - 1

Lie = Callable[[Proposal], Proposal]


def _with_q(*distributions: DraftDistribution) -> Lie:
    return lambda proposal: dataclasses.replace(proposal, distributions=distributions)


def _each(q_of: Callable[[int], DraftDistribution]) -> Lie:
    return lambda proposal: dataclasses.replace(proposal, distributions=tuple(map(q_of, proposal.token_ids)))


LIES: dict[str, Lie] = {
    "none": _with_q(),
    "fewer": lambda proposal: dataclasses.replace(
        proposal,
        token_ids=proposal.token_ids * 3,
        confidences=(),
        distributions=(DraftDistribution(proposal.token_ids[:1], (WEIGHT_TOTAL,)),),
    ),
    "more": lambda proposal: dataclasses.replace(
        proposal, distributions=(DraftDistribution(proposal.token_ids[:1], (WEIGHT_TOTAL,)),) * 40
    ),
    "empty": _each(lambda token: DraftDistribution((), ())),
    "one-hot": _each(lambda token: DraftDistribution((token,), (WEIGHT_TOTAL,))),
    "not its token": _each(lambda token: DraftDistribution((token ^ 1,), (WEIGHT_TOTAL,))),
    "not normalised": _each(lambda token: DraftDistribution((token,), (1,))),
    "too much": _each(lambda token: DraftDistribution((token, token ^ 1), (_HUGE, _HUGE))),
    "zero": _each(lambda token: DraftDistribution((token, token ^ 1), (0, WEIGHT_TOTAL))),
    "twice": _each(lambda token: DraftDistribution((token, token), (WEIGHT_TOTAL // 2, WEIGHT_TOTAL // 2))),
    "outside": _each(lambda token: DraftDistribution((token, _HUGE), (1, WEIGHT_TOTAL - 1))),
    "ragged": _each(lambda token: DraftDistribution((token, token ^ 1), (WEIGHT_TOTAL,))),
    "too many": _each(lambda token: DraftDistribution((token, *range(1000, 5000)), (WEIGHT_TOTAL - 4000, *[1] * 4000))),
    "nearly never": _each(lambda token: DraftDistribution((token, token ^ 1), (1, WEIGHT_TOTAL - 1))),
    "branch": lambda proposal: dataclasses.replace(proposal, is_branch=True),
    "confidence": lambda proposal: dataclasses.replace(proposal, confidences=(float("nan"), -1.0, float("inf")) * 90),
    "no tokens": lambda proposal: dataclasses.replace(proposal, token_ids=()),
    "no place": lambda proposal: dataclasses.replace(proposal, prefix_length=_HUGE, prefix_fingerprint=2**64 - 1),
}


class LyingDraftClient:
    """Every other proposal of a drafter becomes one of ``lies``, in turn, in the form that the wire has for it."""

    def __init__(self, inner: DraftClient, lies: Sequence[Lie]) -> None:
        self._inner = inner
        self._lies = itertools.cycle(lies)
        self._lies_now = itertools.cycle((False, True))

    @property
    def name(self) -> str:
        return f"lying-{self._inner.name}"

    async def describe(self) -> tuple[ModelInfo, bytes]:
        return await self._inner.describe()

    async def connect(self, on_frame: Callable[[DraftFrame], None], on_lost: OnLost) -> DraftConnection:
        def lie(frame: DraftFrame) -> None:
            items: list[tuple[SessionId, DraftEvent]] = []
            for session_id, event in frame:
                told = isinstance(event, Proposal) and next(self._lies_now)
                items.append((session_id, next(self._lies)(event) if told else event))
            on_frame(draft_frame_from_proto(draft_frame_to_proto(tuple(items))))

        return await self._inner.connect(lie, on_lost)

    async def close(self) -> None:
        await self._inner.close()
