"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from coordinator.coordinator import Coordinator
from coordinator.http.answers import respond
from coordinator.http.bodies import ChatBody, Message
from coordinator.http.chat_shape import ChatShape
from coordinator.http.chat_template import DEFAULT_TEMPLATE, render_chat
from coordinator.http.completions import reply_for
from coordinator.http.logprobs import TokenTexts
from coordinator.http.model_name import ModelName
from coordinator.http.request_id import request_id_of
from coordinator.http.translation import chat_tokens, named_as_in, to_request
from coordinator.vocabulary import ServedModel


def chat_router(coordinator: Coordinator, model_name: ModelName) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Goes on with a chat."""
        model_name.check(body.model)
        request_id = request_id_of(request)
        model = coordinator.served_model
        prompt, adds_special_tokens = chat_prompt(
            model, body.messages, body.add_generation_prompt, body.chat_template_kwargs
        )
        generate = to_request(body, prompt, chat_tokens(body), request_id, adds_special_tokens)
        reply = reply_for(body, ChatShape(TokenTexts(model.tokenizer)), request_id, model_name.shown())
        with named_as_in(body):
            return await respond(request, coordinator, [generate], reply)

    return router


def chat_prompt(
    model: ServedModel,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    variables: Mapping[str, object] | None = None,
) -> tuple[str, bool]:
    """The chat as one text, and whether the tokenizer is to add its special tokens: a model's own template has them.

    Raises `InvalidRequest` if the template does not take the chat.
    """
    template = model.info.chat_template
    told = [{"role": message.role, "content": message.text, **_name_of(message)} for message in messages]
    text = render_chat(template or DEFAULT_TEMPLATE, told, add_generation_prompt, variables)
    return text, template is None


def _name_of(message: Message) -> dict[str, str]:
    return {} if message.name is None else {"name": message.name}
