"""``/v1/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from coordinator.coordinator import Coordinator
from coordinator.http.answers import Reply, respond
from coordinator.http.bodies import CompletionBody, GenerationBody
from coordinator.http.logprobs import TokenTexts
from coordinator.http.model_name import ModelName
from coordinator.http.request_id import request_id_of
from coordinator.http.shapes import Shape
from coordinator.http.text_shape import TextShape
from coordinator.http.translation import completion_tokens, named_as_in, prompts_of, to_request


def completions_router(coordinator: Coordinator, model_name: ModelName) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Completes a text, or several."""
        model_name.check(body.model)
        request_id = request_id_of(request)
        requests = [
            to_request(body, prompt, completion_tokens(body), request_id, body.add_special_tokens)
            for prompt in prompts_of(body)
        ]
        reply = reply_for(
            body, TextShape(TokenTexts(coordinator.served_model.tokenizer)), request_id, model_name.shown()
        )
        with named_as_in(body):
            return await respond(request, coordinator, requests, reply)

    return router


def reply_for(body: GenerationBody, shape: Shape, request_id: str, model: str) -> Reply:
    """How the body wants to be answered."""
    return Reply(
        shape=shape,
        request_id=request_id,
        model=model,
        streams=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        traces=body.speculation.trace,
        num_choices=body.n or 1,
    )
