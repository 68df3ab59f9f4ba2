"""Settings of the commands that are no role: ``up``, ``generate`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from rpc.channel import check_address
from rpc.worker_settings import ModelName

DEFAULT_ADDRESS = "127.0.0.1:50051"


def _config(prefix: str) -> SettingsConfigDict:
    return SettingsConfigDict(
        env_prefix=prefix, frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True
    )


class StackSettings(BaseSettings):
    """What every local stack needs to know."""

    model_config = _config("OUTRIDER_")

    target: ModelName = ""
    """Target model: a directory or a Hugging Face name. Both empty: the demo pair."""
    draft: ModelName = ""
    """Draft model: a directory or a Hugging Face name. Both empty: the demo pair."""
    policy: Literal["fixed", "threshold", "goodput"] | None = None
    """How K is chosen. Unset: the coordinator's default."""
    max_k: int | None = Field(default=None, ge=0, le=64)
    """Greatest K. Unset: the coordinator's default."""
    device: str = "auto"
    """Where both models run: auto, cpu, cuda, cuda:1 ..."""
    dtype: str = "auto"
    """Both models' weights: auto, float32, bfloat16, float16."""
    target_threads: int = Field(default=0, ge=0)
    """CPU threads of the target worker. 0: a share of the machine's cores."""
    draft_threads: int = Field(default=0, ge=0)
    """CPU threads of the draft worker. 0: a share of the machine's cores."""


class UpSettings(StackSettings):
    """``outrider up``."""

    model_config = _config("OUTRIDER_UP_")

    host: str = "127.0.0.1"
    """Address the coordinator listens on."""
    grpc_port: int = Field(default=50051, ge=0, le=65535)
    """Port of the coordinator. 0: any free one."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    """Port of the OpenAI-compatible HTTP API. 0: any free one."""
    no_http: bool = False
    """Serve gRPC alone."""
    no_draft: bool = False
    """Plain decoding: start no draft worker."""


class DemoSettings(StackSettings):
    """``outrider demo``."""

    model_config = _config("OUTRIDER_DEMO_")

    prompt: str = ""
    """Python code to complete. Empty: a prompt of ours."""
    max_tokens: int = Field(default=128, ge=1)
    """Tokens to generate in each run."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Selects the noise at temperatures above 0."""
    repeats: int = Field(default=3, ge=1, le=100)
    """Pairs of runs, speculative and plain in turn, to take medians of."""
    as_json: bool = Field(default=False, validation_alias="OUTRIDER_DEMO_JSON")
    """Print one JSON object and nothing else."""


class GenerateSettings(BaseSettings):
    """``outrider generate``. What is unset, the server decides."""

    model_config = _config("OUTRIDER_GENERATE_")

    address: str = DEFAULT_ADDRESS
    """The coordinator, as host:port."""
    model: str = ""
    """Refuse to run on any other model than this."""
    max_tokens: int | None = 256
    """Most tokens to generate."""
    temperature: float | None = None
    """0, the default, is greedy."""
    top_k: int | None = None
    """Keep the most likely tokens. 0 is off."""
    top_p: float | None = None
    """Keep the most likely tokens until their mass reaches this, in (0, 1]. 1 is off."""
    seed: int | None = None
    """Selects the noise; the same seed gives the same text. Unset: drawn by the server."""
    min_p: float | None = None
    """Keep tokens at least this many times as likely as the most likely one, in [0, 1]. 0 is off."""
    repetition_penalty: float | None = None
    """Divides positive and multiplies negative logits of all tokens seen so far. 1 is off."""
    presence_penalty: float | None = None
    """Taken off the logits of tokens in the output, in [-2, 2]."""
    frequency_penalty: float | None = None
    """The same, times how often they are there."""
    logit_bias: tuple[str, ...] = ()
    """Added to a token's logit, as TOKEN_ID:BIAS. May be repeated."""
    bad_words: tuple[str, ...] = ()
    """Never in the output. May be repeated."""
    min_tokens: int | None = None
    """No stop token or stop string before so many tokens."""
    n: int | None = None
    """Answers to the same prompt; more than one needs --json."""
    stop: str = ""
    """End where this text appears."""
    include_stop_str_in_output: bool = False
    """Leave the stop string in the output."""
    logprobs: int | None = None
    """Tell the logprob of each token and so many of the most likely ones, with --json."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    json_schema: Path | None = None
    """Answer in JSON that fits the schema in this file."""
    json_object: bool = False
    """Answer with a JSON object."""
    regex: str | None = None
    """Answer with what this regular expression matches as a whole."""
    grammar: Path | None = None
    """Answer by the EBNF in this file, as GBNF (root ::= ...) or Lark (start: ...)."""
    speculation: bool = True
    """Speculate; never changes the text, unless --method says so."""
    policy: Literal["fixed", "threshold", "goodput"] | None = None
    """How K is chosen. Unset: the server's choice."""
    k: int | None = None
    """K for the fixed policy, the greatest K otherwise."""
    method: Literal["coupled", "rejection", "block"] | None = None
    """How drafted tokens are verified. Unset: coupled; the others keep the text's distribution, not the text."""
    draft_top_n: int | None = None
    """Most likely tokens that the drafter draws from and tells of, for rejection and block. Unset: 64."""
    as_json: bool = Field(default=False, validation_alias="OUTRIDER_GENERATE_JSON")
    """Print one JSON object when done."""

    @field_validator("address")
    @classmethod
    def _check_address(cls, value: str) -> str:
        check_address(value)
        return value
