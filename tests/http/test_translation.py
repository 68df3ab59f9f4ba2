"""Bodies into requests and events into OpenAI's shapes, without a server."""

from __future__ import annotations

from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models

from coordinator.events import FinishedEvent, Timing, TokenPiece
from coordinator.http.bodies import ChatBody, CompletionBody
from coordinator.http.figures import metrics
from coordinator.http.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from coordinator.http.model_name import last_part
from coordinator.http.structured import structure_of
from coordinator.http.translation import chat_tokens, prompts_of, to_request
from grammar import GrammarCompiler
from rpc.errors import InvalidRequest
from speculation.messages import FinishReason, Grammar, TokenLogprobs
from speculation.session_stats import SessionStats
from tests.doubles.scripted_workers import toy_tokenizer_json
from tests.doubles.tiny_models import VOCAB_SIZE, byte_level_tokenizer

CHAT = [{"role": "user", "content": "a"}]


def test_every_field_of_the_engine_is_reached() -> None:
    body = CompletionBody.model_validate(
        {
            "prompt": "a",
            "temperature": 0.5,
            "top_k": -1,
            "top_p": 0.9,
            "min_p": 0.1,
            "seed": 3,
            "n": 2,
            "stop": "x",
            "logit_bias": {"7": -100, "8": 1.5},
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "repetition_penalty": 1.1,
            "bad_words": ["no"],
            "min_tokens": 2,
            "stop_token_ids": [4],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "logprobs": 5,
            "speculation": {"policy": "fixed", "k": 3, "lookahead": 9, "method": "block", "draft_top_n": 7},
        }
    )
    request = to_request(body, "a", 16, "id")
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (0.5, 0, 0.9, 0.1)
    assert (request.seed, request.n, request.stop, request.logprobs) == (3, 2, ("x",), 5)
    assert request.logit_bias == ((7, -100), (8, 1.5))
    assert (request.presence_penalty, request.frequency_penalty, request.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (request.bad_words, request.min_tokens, request.stop_token_ids) == (("no",), 2, (4,))
    assert (request.ignore_eos, request.include_stop_str_in_output) == (True, True)
    assert (request.speculation.policy, request.speculation.k, request.speculation.lookahead) == ("fixed", 3, 9)
    assert (request.speculation.method, request.speculation.draft_top_n) == ("block", 7)


def test_figures_are_those_of_all_choices() -> None:
    choices = [
        FinishedEvent(
            FinishReason.LENGTH,
            num_prompt_tokens=4,
            num_completion_tokens=9,
            stats=SessionStats(num_proposed=8, num_accepted=5, steps_by_accepted=Counter(accepted)),
            policy="fixed",
            timing=Timing(0.0, 0.1, 0.2),
            estimated_speedup=speedup,
        )
        for accepted, speedup in (({0: 1, 2: 1, 3: 1}, 1.5), ({0: 2, 5: 1}, 0.0))
    ]
    told = metrics(choices)["speculative_decoding"]
    assert told["acceptance_histogram"] == [3, 0, 1, 1, 0, 1]
    assert told["num_wasted_tokens"] == 6
    assert told["estimated_speedup"] == 1.5  # that of the other is not known
    assert metrics(choices[1:])["speculative_decoding"]["estimated_speedup"] is None


def test_what_openai_leaves_out_it_does_not_mean() -> None:
    request = to_request(CompletionBody(prompt="a"), "a", 16, "id")
    assert (request.temperature, request.logprobs, request.n, request.stop) == (1.0, None, None, ())
    chat = ChatBody.model_validate({"messages": CHAT, "logprobs": True})
    assert to_request(chat, "a", None, "id").logprobs == 0
    assert chat_tokens(chat) is None
    with pytest.raises(InvalidRequest, match="max_completion_tokens"):
        chat_tokens(ChatBody.model_validate({"messages": CHAT, "max_tokens": 3, "max_completion_tokens": 4}))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"store": True}, "store"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_is_not_served_or_makes_no_sense_is_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        to_request(ChatBody.model_validate({"messages": CHAT, **fields}), "a", None, "id")
    assert refused.value.violations[0].field == field


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            "json_schema",
            '{"type": "object"}',
        ),
        ({"guided_json": {"type": "array"}}, "json_schema", '{"type": "array"}'),
        ({"guided_regex": "[ab]+"}, "regex", "[ab]+"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "ebnf", "root ::= x"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, "ebnf", 'start: "yes" | "n\\"o"'),
    ],
)
def test_the_ways_to_ask_for_a_form(fields: dict[str, object], kind: str, text: str) -> None:
    structure = structure_of(ChatBody.model_validate({"messages": CHAT, **fields}))
    assert structure is not None
    assert (structure.kind, structure.text) == (kind, text)


def test_any_text_is_no_form() -> None:
    assert structure_of(ChatBody.model_validate({"messages": CHAT, "response_format": {"type": "text"}})) is None


def test_prompts_in_their_four_forms() -> None:
    assert prompts_of(CompletionBody(prompt="a")) == ["a"]
    assert prompts_of(CompletionBody(prompt=["a", "b"])) == ["a", "b"]
    assert prompts_of(CompletionBody(prompt=[1, 2])) == [[1, 2]]
    assert prompts_of(CompletionBody(prompt=[[1, 2], [3]])) == [[1, 2], [3]]


def test_paths_are_shown_by_their_last_part() -> None:
    assert last_part("/srv/models/target/") == "target"
    assert last_part("./target") == "target"
    assert last_part("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert last_part("gpt2") == "gpt2"


def test_logprobs_in_both_shapes() -> None:
    texts = TokenTexts(Tokenizer.from_buffer(toy_tokenizer_json("abĀĩefghij")))  # the third token is byte 0x00
    pieces = [
        TokenPiece(1, "a", True, TokenLogprobs(-0.5, ((1, -0.5), (2, -1.0)))),
        TokenPiece(0, "", False, TokenLogprobs(float("-inf"), ())),
    ]
    completion = completion_logprobs(pieces, 7, texts)
    assert completion == {
        "tokens": ["a", "<eos>"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"a": -0.5, "b": -1.0}, {}],
        "text_offset": [7, 8],
    }
    chat = chat_logprobs(pieces, texts)
    assert chat is not None
    assert isinstance(chat["content"], list)
    assert chat["content"][0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "b", "logprob": -1.0, "bytes": [98]},
        ],
    }
    assert completion_logprobs([TokenPiece(1, "a", True)], 0, texts) is None
    assert chat_logprobs([], texts) is None


def test_a_part_of_a_character_is_called_by_its_bytes() -> None:
    texts = TokenTexts(Tokenizer.from_buffer(toy_tokenizer_json("ðbcdefghij")))  # how the vocabulary writes byte 0xF0
    assert texts.text_of(1) == "bytes:\\xf0"
    assert texts.bytes_of(1) == b"\xf0"


def test_tokens_that_begin_with_a_space_keep_it() -> None:
    vocabulary = {"▁hello": 0, "<0xF0>": 1, "lo": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="lo"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = TokenTexts(tokenizer)
    assert [texts.text_of(token_id) for token_id in (0, 1, 2)] == [" hello", "bytes:\\xf0", "lo"]


@pytest.mark.parametrize("text", ["", "a", 'n"o', "\\", "\x00", "\x1f\x7f", "\u2028", "é🙂", "a\nroot ::= b", "/{}/"])
def test_a_choice_may_be_any_text(text: str) -> None:
    tokenizer = byte_level_tokenizer()
    structure = structure_of(CompletionBody(prompt="a", guided_choice=[text, "another"]))
    assert structure is not None
    path = GrammarCompiler(tokenizer.to_str(), VOCAB_SIZE, [0]).compile(Grammar(structure.kind, structure.text), (), 0)
    said = [*tokenizer.encode(text).ids, 0]
    assert path.num_allowed(said) == len(said)
    assert path.num_allowed([*tokenizer.encode(f"{text}!").ids]) < len(said)
