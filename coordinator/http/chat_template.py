"""A chat as a prompt: by the model's own template, or a plain one where it has none.

Templates come with models and are programs, so they run in Jinja's sandbox, with what Hugging Face's give them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coordinator.http.errors import invalid
from speculation.messages import ChatTemplate

DEFAULT_TEMPLATE = ChatTemplate(
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For base models, which know no roles: a transcript."""


def render_chat(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, object]],
    add_generation_prompt: bool = True,
    variables: Mapping[str, object] | None = None,
) -> str:
    """The prompt. Raises `InvalidRequest` with the template's own words if it does not take these messages."""
    context = {**dict(template.special_tokens), **(variables or {})}
    context |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
        return _compiled(template.source).render(context)
    except Exception as error:  # a template may do anything, and fail in any way
        raise invalid("messages", f"the model's chat template does not take this chat: {error}") from error


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
