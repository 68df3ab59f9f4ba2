"""``/tokenize`` and ``/detokenize``, in vLLM's shape."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from coordinator.coordinator import Coordinator
from coordinator.http.bodies import Body, Messages, TokenIds
from coordinator.http.chat import chat_prompt
from coordinator.http.errors import invalid
from coordinator.http.model_name import ModelName
from coordinator.http.shapes import Json
from coordinator.requests import text_token_ids
from coordinator.vocabulary import ServedModel, token_strings


class TokenizeBody(Body):
    """A text, or a chat."""

    model: str = ""
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Unset: as the server does it, for a text yes, after the model's chat template no."""
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: str = ""
    tokens: TokenIds


def tokens_router(coordinator: Coordinator, model_name: ModelName) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Json:
        """The tokens of a prompt, and how many fit."""
        model_name.check(body.model)
        model = coordinator.served_model
        text, adds_special_tokens = _text_of(body, model)
        if body.add_special_tokens is not None:
            adds_special_tokens = body.add_special_tokens
        try:
            token_ids = await asyncio.to_thread(text_token_ids, text, model, adds_special_tokens)
        except UnicodeEncodeError as error:
            raise invalid("prompt", f"is not valid Unicode: {error.reason}") from error
        strings = token_strings(model.tokenizer) if body.return_token_strs else None
        return {
            "count": len(token_ids),
            "max_model_len": model.info.max_context,
            "tokens": token_ids,
            "token_strs": None if strings is None else [strings.get(id_, "") for id_ in token_ids],
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Json:
        """The text of tokens; special tokens have none."""
        model_name.check(body.model)
        model = coordinator.served_model
        outside = next((id_ for id_ in body.tokens if not 0 <= id_ < model.info.tokenizer_size), None)
        if outside is not None:
            raise invalid("tokens", f"token id {outside} is outside the vocabulary [0, {model.info.tokenizer_size})")
        return {"prompt": await asyncio.to_thread(model.tokenizer.decode, body.tokens)}

    return router


def _text_of(body: TokenizeBody, model: ServedModel) -> tuple[str, bool]:
    """The text, and whether special tokens are to be added to it."""
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "give either prompt or messages")
    if body.messages is None:
        return body.prompt or "", True
    return chat_prompt(model, body.messages, body.add_generation_prompt)
