"""A log line when a request is accepted, and one when it is over. Their text is in neither unless it was asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from coordinator.session import Session
from speculation.messages import TokenId

_log = logging.getLogger(__name__)


def log_fields(session: Session) -> dict[str, Any]:
    """What identifies a session in every line about it."""
    return {"request_id": session.job.request_id, "session_id": session.id}


class RequestLog:
    """Writes at level info, so that by default there is no cost but a comparison."""

    def __init__(self, with_text: bool) -> None:
        """``with_text``: prompts and outputs too."""
        self._with_text = with_text

    def accepted(self, session: Session, prompt: str | Sequence[TokenId]) -> None:
        if _log.isEnabledFor(logging.INFO):
            fields = {**log_fields(session), "arm": session.arm.value}
            fields["num_prompt_tokens"] = len(session.job.prompt_token_ids)
            if self._with_text:
                fields["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
            _log.info("request accepted", extra=fields)

    def over(self, session: Session, tokenizer: Tokenizer) -> None:
        if _log.isEnabledFor(logging.INFO):
            fields = {**log_fields(session), **_summary(session)}
            if self._with_text and session.was_placed:
                token_ids = session.relay.token_ids[len(session.job.prompt_token_ids) :]
                fields["output"] = tokenizer.decode(list(token_ids), skip_special_tokens=True)
            _log.info("request over", extra=fields)


def _summary(session: Session) -> dict[str, Any]:
    stats = session.stats
    return {
        "arm": session.arm.value,
        "outcome": session.outcome,
        "target": session.target_name,
        "draft": session.draft_name,
        "num_tokens": stats.num_committed,
        "num_steps": stats.num_steps,
        "num_drafted": stats.num_drafted,
        "num_accepted": stats.num_accepted,
        "num_looked_up": stats.num_looked_up,
        "num_looked_up_accepted": stats.num_looked_up_accepted,
        "queue_s": _elapsed_s(session.arrived_s, session.placed_s),
        "first_token_s": _elapsed_s(session.arrived_s, session.first_token_s),
        "total_s": _elapsed_s(session.arrived_s, session.over_s),
    }


def _elapsed_s(start_s: float, stop_s: float) -> float | None:
    """None if it never came to ``stop_s``."""
    return round(stop_s - start_s, 6) if stop_s else None
