"""What clients may send, field by field. A field that is not here is refused by name.

Types and shapes are checked here; values and limits where the engine checks them, in `coordinator.requests`.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from coordinator.sampling_checks import MAX_BIASES

MAX_PROMPTS = 64
"""Prompts in one completion request."""

MAX_UNKNOWN_TOLD = 8
"""Fields that nobody knows, of which a refusal tells: to tell of megabytes of them would take everybody's time."""


class Body(BaseModel):
    """Values have the type that JSON gives them: true is no number, and neither is "5"."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, values: object) -> object:
        """Clients write null for what they leave out. Of fields that nobody knows the first are left, to be refused."""
        if not isinstance(values, dict):
            return values
        known = {name: values[name] for name in cls.model_fields if values.get(name) is not None}
        unknown = itertools.islice((name for name in values if name not in cls.model_fields), MAX_UNKNOWN_TOLD)
        return known | {name: values[name] for name in unknown}


def _few(biases: object) -> object:
    """Before each is looked at."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"has {len(biases)} tokens; at most {MAX_BIASES}")
    return biases


TokenIds = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
"""The first wrong item is told of: a body has room for a million, and to tell of each takes a minute."""
Biases = Annotated[dict[str, float], BeforeValidator(_few)]


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool = False
    """One more chunk at the end, without choices, that has ``usage``."""


class SpeculationBody(Body):
    """How to speculate; only ``method`` may change the text. Unset is the deployment's choice."""

    enabled: bool = True
    """false: plain decoding."""
    policy: Literal["fixed", "threshold", "goodput"] | None = None
    """How K is chosen."""
    k: int | None = None
    """The K of ``fixed``, otherwise the greatest K."""
    lookahead: int | None = None
    """Draft at most this many tokens beyond the committed ones."""
    method: Literal["coupled", "rejection", "block"] | None = None
    """How drafts are verified: ``coupled`` (default) for the tokens of plain decoding, else for its distribution."""
    draft_top_n: int | None = None
    """Tokens in the drafter's distribution, for ``rejection`` and ``block``."""
    turns: bool = False
    """For measurements: the two workers take turns."""
    trace: bool = False
    """Every chunk of a stream tells of its step: tokens, which were drafted or looked up, K."""


class GenerationBody(Body):
    """What completions and chat completions have in common."""

    model: str = ""
    """As ``/v1/models`` says; empty is the one that is served."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    """Unset: 1, as at OpenAI. 0 is greedy."""
    top_p: float | None = None
    seed: int | None = None
    """The same seed gives the same text. Unset: drawn by the server."""
    n: int | None = None
    stop: str | Texts | None = None
    logit_bias: Biases | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None
    """Taken, and of no effect."""
    metadata: dict[str, Any] | None = None
    """Taken, and of no effect."""

    # What vLLM's clients send in `extra_body`.
    top_k: int | None = None
    """0 or -1 is off."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    bad_words: Texts | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None

    speculation: SpeculationBody = SpeculationBody()


Prompts = Annotated[Texts | Annotated[list[TokenIds], Field(fail_fast=True)], Field(max_length=MAX_PROMPTS)]


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: str | TokenIds | Prompts
    """A text, token ids, or several of either."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True
    """Let the tokenizer add what it adds to a text, such as a beginning-of-text token."""


class TextPart(Body):
    """A part of a message's content; this server knows text alone."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | Annotated[list[TextPart], Field(fail_fast=True)] | None, Field(validate_default=True)] = (
        None
    )
    name: str | None = None

    # What an answer has, null, and comes back with it when the chat goes on.
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: None = None

    @field_validator("content")
    @classmethod
    def _is_said(cls, content: str | list[TextPart] | None, info: ValidationInfo) -> str | list[TextPart] | None:
        if content is None and info.data.get("role") != "assistant":
            raise ValueError("is missing; only a message of the assistant may have none")
        return content

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: int | None = None
    """The newer name of ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    """More variables for the chat template."""
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: Texts | None = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    service_tier: str | None = None
    store: bool | None = None
