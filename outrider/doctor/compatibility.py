"""Do two models go together? From what their files say; neither has to have run."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.vocabulary import ServedModel, check_same_vocabulary, token_strings
from rpc.errors import ModelMismatch


class Level(enum.Enum):
    """How much a finding matters."""

    GOOD = "ok"
    WARNING = "warning"
    """It works, and may be slower or another text than one expects."""
    PROBLEM = "problem"
    """The two cannot be a pair."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    check: str
    level: Level
    message: str
    """What was found; unless all is well also what to do."""


@dataclass(frozen=True, slots=True)
class Described:
    """What a model's files say."""

    served: ServedModel
    chat_template: str | None


def compatibility(target: Described, draft: Described) -> list[Finding]:
    """All checks, the decisive ones first."""
    return [
        _vocabulary(target.served, draft.served),
        _sizes(target.served, draft.served),
        _special_tokens(target.served, draft.served),
        _end_tokens(target.served, draft.served),
        _chat_templates(target, draft),
        _context(target.served, draft.served),
    ]


def has_problem(findings: list[Finding]) -> bool:
    """Whether one of them rules the pair out."""
    return any(finding.level is Level.PROBLEM for finding in findings)


def _vocabulary(target: ServedModel, draft: ServedModel) -> Finding:
    try:
        check_same_vocabulary(target, draft)
    except ModelMismatch as error:
        return Finding("vocabulary", Level.PROBLEM, error.message)
    shared = token_strings(target.tokenizer).keys() & token_strings(draft.tokenizer).keys()
    return Finding("vocabulary", Level.GOOD, f"all {len(shared)} token ids that both know are the same tokens")


def _sizes(target: ServedModel, draft: ServedModel) -> Finding:
    ours, theirs = token_strings(target.tokenizer).keys(), token_strings(draft.tokenizer).keys()
    missing, extra = len(ours - theirs), len(theirs - ours)
    if not missing and not extra:
        return Finding("vocabulary size", Level.GOOD, f"{len(ours)} tokens in both")
    return Finding(
        "vocabulary size",
        Level.WARNING,
        f"the draft lacks {missing} of the target's {len(ours)} tokens and has {extra} of its own: those are never "
        "drafted or never accepted; fine if they are rare",
    )


def _special_tokens(target: ServedModel, draft: ServedModel) -> Finding:
    ours, theirs = special_tokens(target), special_tokens(draft)
    differing = sorted(ours.items() ^ theirs.items())
    if not differing:
        return Finding("special tokens", Level.GOOD, f"the same {len(ours)} in both")
    named = ", ".join(f"{token!r} ({id_})" for token, id_ in differing[:3])
    return Finding(
        "special tokens",
        Level.WARNING,
        f"{len(differing)} are special to one model only: {named}; the draft may never have seen them: "
        "expect misses around them",
    )


def special_tokens(model: ServedModel) -> Mapping[str, int]:
    """The added tokens that the tokenizer marks as special, with their ids."""
    added = json.loads(model.tokenizer_json).get("added_tokens", [])
    return {token["content"]: token["id"] for token in added if token.get("special")}


def _end_tokens(target: ServedModel, draft: ServedModel) -> Finding:
    ours, theirs = set(target.info.eos_token_ids), set(draft.info.eos_token_ids)
    if ours == theirs:
        return Finding("end of text", Level.GOOD, f"both end with {_ids(ours)}")
    if not ours:
        message = "the target names no end token, so answers end at max_tokens; set eos_token_id in its config"
    else:
        message = f"the target ends with {_ids(ours)}, the draft with {_ids(theirs)}: ends are decided by the target "
        message += "alone, the draft will rarely foresee them"
    return Finding("end of text", Level.WARNING, message)


def _ids(token_ids: set[int]) -> str:
    return ", ".join(map(str, sorted(token_ids))) or "no token"


def _chat_templates(target: Described, draft: Described) -> Finding:
    if target.chat_template == draft.chat_template:
        found = "the same in both" if target.chat_template else "none in either"
        return Finding("chat template", Level.GOOD, found)
    if not draft.chat_template:
        what = "only the target has one: the draft may not be trained for chats"
    elif not target.chat_template:
        what = "only the draft has one: use the target as a text completer, or its chat version"
    else:
        what = "the two differ: the target's is used, which is not the one the draft was trained with"
    return Finding("chat template", Level.WARNING, f"{what}; acceptance on chats may be lower than measured here")


def _context(target: ServedModel, draft: ServedModel) -> Finding:
    ours, theirs = target.info.max_context, draft.info.max_context
    if theirs >= ours:
        return Finding("context", Level.GOOD, f"target {ours} tokens, draft {theirs}")
    return Finding(
        "context",
        Level.WARNING,
        f"the draft ends at {theirs} tokens, the target at {ours}: beyond {theirs} it is plain decoding",
    )
