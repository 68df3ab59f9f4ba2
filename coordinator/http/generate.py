"""``/generate``: a prompt, a text, and what speculation was worth. The smallest API that shows what this is for."""

from __future__ import annotations

from contextlib import aclosing

from fastapi import APIRouter, Request

from coordinator.coordinator import Coordinator
from coordinator.events import FinishedEvent, TokensEvent
from coordinator.http.bodies import Body
from coordinator.http.disconnect import while_connected
from coordinator.http.request_id import request_id_of
from coordinator.http.shapes import Json
from coordinator.requests import GenerateRequest, SpeculationOptions

DEFAULT_MAX_TOKENS = 128


class GenerateBody(Body):
    """Greedy unless told otherwise."""

    prompt: str
    max_tokens: int = DEFAULT_MAX_TOKENS
    use_speculative: bool = True
    """false: plain decoding. The text is the same."""
    temperature: float = 0.0
    seed: int | None = None


def generate_router(coordinator: Coordinator) -> APIRouter:
    router = APIRouter()

    @router.post("/generate")
    async def generate(body: GenerateBody, request: Request) -> Json:
        """Completes a prompt. ``speedup`` is against plain steps as measured here; null where it cannot be told."""
        text, end = await while_connected(request, _complete(coordinator, _request(body, request_id_of(request))))
        stats = end.stats
        return {
            "text": text,
            "metrics": {
                "acceptance_rate": round(stats.acceptance_rate, 4),
                "speedup": round(end.estimated_speedup, 2) or None,
                "K": round(stats.mean_k, 2),
            },
        }

    return router


def _request(body: GenerateBody, request_id: str) -> GenerateRequest:
    return GenerateRequest(
        prompt=body.prompt,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        seed=body.seed,
        speculation=SpeculationOptions(disabled=not body.use_speculative),
        request_id=request_id,
    )


async def _complete(coordinator: Coordinator, request: GenerateRequest) -> tuple[str, FinishedEvent]:
    texts: list[str] = []
    async with aclosing(coordinator.generate(request)) as events:
        async for event in events:
            if isinstance(event, FinishedEvent):
                return "".join(texts), event
            if isinstance(event, TokensEvent):
                texts.append(event.text)
    raise AssertionError("a request ended without its last event")
