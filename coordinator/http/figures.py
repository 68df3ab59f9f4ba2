"""Counts of an answer: OpenAI's ``usage``, and what speculation did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from coordinator.events import FinishedEvent, TokensEvent
from coordinator.http.shapes import Json
from coordinator.step_trace import ProposalTrace, StepTrace


def usage(finished: Sequence[FinishedEvent], num_choices_per_prompt: int = 1) -> Json:
    """``completion_tokens`` are those of all choices; a prompt counts once for all its choices.

    ``accepted_prediction_tokens`` are completion tokens that the drafter proposed and the target confirmed: a part of
    ``completion_tokens``. Drafted tokens that were rejected are nobody's completion tokens and are not billed here.
    """
    num_prompt = sum(event.num_prompt_tokens for event in finished) // num_choices_per_prompt
    num_completion = sum(event.num_completion_tokens for event in finished)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(event.stats.num_accepted for event in finished)
        },
    }


def metrics(finished: Sequence[FinishedEvent]) -> Json:
    """Speculation and times, over all choices of the request."""
    steps = sum(event.stats.num_steps for event in finished)
    drafted = sum(event.stats.num_drafted for event in finished)
    accepted = sum(event.stats.num_accepted for event in finished)
    completion = sum(event.num_completion_tokens for event in finished)
    return {
        "speculative_decoding": {
            "policy": finished[0].policy,
            "num_steps": steps,
            "num_free_run_steps": sum(event.stats.num_free_run_steps for event in finished),
            "num_draft_tokens": drafted,
            "num_accepted_tokens": accepted,
            "num_lookup_tokens": sum(event.stats.num_looked_up for event in finished),
            "num_accepted_lookup_tokens": sum(event.stats.num_looked_up_accepted for event in finished),
            "num_proposed_tokens": sum(event.stats.num_proposed for event in finished),
            "acceptance_rate": _ratio(accepted, drafted),
            "mean_acceptance_length": _ratio(completion, steps),
            "mean_k": _ratio(sum(event.stats.sum_k for event in finished), steps),
            "num_misses": sum(event.stats.num_misses for event in finished),
            "num_caught": sum(event.stats.num_caught for event in finished),
            "num_wasted_tokens": sum(event.stats.num_wasted for event in finished),
            "acceptance_histogram": _histogram(finished),
            "estimated_speedup": _speedup(finished),
        },
        "timing": {
            "queue_s": _longest(event.timing.queue_s for event in finished),
            "first_token_s": round(min(event.timing.first_token_s for event in finished), 6),
            "total_s": _longest(event.timing.total_s for event in finished),
        },
    }


def _histogram(finished: Sequence[FinishedEvent]) -> list[int]:
    """By number of accepted tokens, from 0: the steps with drafts that accepted so many."""
    steps = sum((event.stats.steps_by_accepted for event in finished), Counter[int]())
    return [steps[count] for count in range(max(steps, default=-1) + 1)]


def _speedup(finished: Sequence[FinishedEvent]) -> float | None:
    """Mean of the choices' estimates; None where it cannot be told."""
    known = [event.estimated_speedup for event in finished if event.estimated_speedup]
    return round(sum(known) / len(known), 4) if known else None


def trace(event: TokensEvent) -> Json:
    """One step of the target, for whoever wants to show it: ``"speculation": {"trace": true}``."""
    step = event.trace
    num_branch = 0 if step is None else step.num_branch
    tokens = [
        {
            "id": piece.token_id,
            "text": piece.text,
            "drafted": piece.drafted,
            "branch": index < num_branch,
            "looked_up": piece.looked_up,
        }
        for index, piece in enumerate(event.tokens)
    ]
    told: Json = {
        "tokens": tokens,
        "num_drafted": event.num_drafted,
        "num_looked_up": event.num_looked_up,
        "k": event.k,
    }
    return told if step is None else {**told, "step": _step(step)}


def _step(step: StepTrace) -> Json:
    return {
        "at_s": round(step.at_s, 6),
        "step_s": round(step.step_s, 6),
        "waited_s": round(step.waited_s, 6),
        "num_sessions": step.num_sessions,
        "missed": step.missed,
        "caught": step.caught,
        "proposals": [_proposal(proposal) for proposal in step.proposals],
    }


def _proposal(proposal: ProposalTrace) -> Json:
    return {
        "at_s": round(proposal.at_s, 6),
        "start": proposal.start,
        "num_tokens": proposal.num_tokens,
        "branch": proposal.is_branch,
    }


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _longest(times_s: Iterable[float]) -> float:
    return round(max(times_s), 6)
