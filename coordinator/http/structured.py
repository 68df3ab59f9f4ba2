"""What an answer has to look like: OpenAI's ``response_format``, vLLM's ``structured_outputs`` and ``guided_...``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.http.bodies import GenerationBody
from coordinator.http.errors import invalid


@dataclass(frozen=True, slots=True)
class Structure:
    """One of the engine's kinds of grammar, its text, and the body's field that asked for it."""

    kind: str
    """json_schema, json_object, regex or ebnf."""
    text: str
    field: str


def structure_of(body: GenerationBody) -> Structure | None:
    """What the body asks for; None: any text. Raises `InvalidRequest` if that is not clear, or asked for twice."""
    found = [*_from_response_format(body.response_format), *_from_options(body), *_from_guided(body)]
    if len(found) > 1:
        raise invalid(found[1].field, f"says how the answer has to look, as does {found[0].field}; give one of them")
    return found[0] if found else None


def _from_response_format(given: Mapping[str, Any] | None) -> Iterator[Structure]:
    field = "response_format"
    if given is None:
        return
    match given.get("type"):
        case "text":
            return
        case "json_object":
            yield Structure("json_object", "", field)
        case "json_schema":
            described = given.get("json_schema")
            schema = described.get("schema") if isinstance(described, dict) else None
            if not isinstance(schema, dict):
                raise invalid(f"{field}.json_schema.schema", "is missing; give a JSON schema")
            yield Structure("json_schema", json.dumps(schema), field)
        case other:
            raise invalid(f"{field}.type", f"is {str(other)[:60]!r}; must be one of text, json_object, json_schema")


def _from_options(body: GenerationBody) -> Iterator[Structure]:
    for name, value in (body.structured_outputs or {}).items():
        if value is not None:
            yield _structure(f"structured_outputs.{name}", name, value)


def _from_guided(body: GenerationBody) -> Iterator[Structure]:
    for name in ("json", "regex", "choice", "grammar"):
        value = getattr(body, f"guided_{name}")
        if value is not None:
            yield _structure(f"guided_{name}", name, value)


def _structure(field: str, name: str, value: object) -> Structure:
    match name, value:
        case "json", str():
            return Structure("json_schema", value, field)
        case "json", dict():
            return Structure("json_schema", json.dumps(value), field)
        case "json_object", True:
            return Structure("json_object", "", field)
        case "regex", str():
            return Structure("regex", value, field)
        case "grammar", str():
            return Structure("ebnf", value, field)
        case "choice", list() if value and all(isinstance(one, str) for one in value):
            return Structure("ebnf", _one_of(value), field)
    raise invalid(field, "is not known here; use json, json_object, regex, choice (a list of texts) or grammar")


def _one_of(texts: Sequence[str]) -> str:
    """As Lark, which reads JSON's quotes and escapes; but it has no place for a bare DEL, which JSON has."""
    return "start: " + " | ".join(json.dumps(text).replace("\x7f", "\\u007f") for text in texts)
