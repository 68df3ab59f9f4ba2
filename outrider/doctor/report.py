"""What the doctor found, as tables of at most 100 columns and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from rich import box
from rich.markup import escape
from rich.table import Table

from outrider.doctor.compatibility import Finding, Level
from outrider.doctor.divergence import Divergence, TokenScore, Verified, unexplained
from outrider.doctor.examination import Examination, Measured
from outrider.doctor.memory import ModelMemory, shown
from outrider.doctor.prediction import Predictions

WIDTH: Final = 100
_MAX_SHOWN_DIVERGENCES: Final = 20
_STYLES: Final = {Level.GOOD: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row for each check."""
    table = _table("Do they go together?")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        level = f"[{_STYLES[finding.level]}]{finding.level.value}[/]"
        table.add_row(finding.check, level, escape(finding.message))
    return table


def memory_table(models: Sequence[ModelMemory]) -> Table:
    """One row for each model."""
    table = _table("Memory")
    for name in ("", "weights", "KV per token", "KV pool", "needed", "free", "on"):
        table.add_column(name, justify="left" if name in ("", "on") else "right", no_wrap=True)
    for model in models:
        free = "?" if model.free_bytes is None else shown(model.free_bytes)
        sizes = (model.weights_bytes, model.kv_bytes_per_token, model.pool_bytes, model.needed_bytes)
        table.add_row(model.role, *map(shown, sizes), free, model.device)
    return table


def prediction_table(predictions: Predictions, measured: Measured) -> Table:
    """One row for each K."""
    table = _table(f"Speedup over plain decoding, temperature {predictions.temperature:g}")
    for name in ("K", "step, ms", "accepted\nat depth K", "tokens\nper step", "taking\nturns", "stream", "ideal"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in predictions.by_k:
        table.add_row(
            str(one.k),
            f"{1000 * measured.times.target_s[one.k + 1]:.2f}",
            f"{one.conditional_acceptance:.2f}",
            f"{one.tokens_per_step:.2f}",
            f"{one.turns:.2f}",
            f"{one.stream:.2f}",
            f"{one.ideal:.2f}",
            style="bold" if one is predictions.best else "",
        )
    return table


def prediction_lines(predictions: Predictions, measured: Measured) -> list[str]:
    """What to make of the table."""
    times, best = measured.times, predictions.best
    plain_ms, draft_ms = 1000 * times.target_s[1], 1000 * times.draft_s
    lines = [
        f"The draft foresees {100 * predictions.acceptance:.0f} % of the target's tokens; a plain step takes "
        f"{plain_ms:.2f} ms, a drafted token {draft_ms:.2f} ms."
    ]
    if max(best.stream, predictions.adaptive) < 1.0:
        lines.append("Speculation will not pay here: the policy will mostly choose K = 0, plain decoding.")
    else:
        lines.append(
            f"Best fixed K = {best.k} at {best.stream:.2f} times plain; the goodput policy, which chooses K itself, "
            f"{predictions.adaptive:.2f} times."
        )
    lines.append("From bare steps, each model on cores of its own; `outrider bench` measures the pair in service.")
    return lines


def equality_table(results: Sequence[Verified]) -> Table:
    """One row for each way of verifying."""
    table = _table("Is it plain decoding, token for token?")
    for name in ("temperature", "verified with", "tokens", "steps", "largest logit\ndifference", "divergences"):
        table.add_column(name, justify="left" if name == "verified with" else "right", no_wrap=True)
    for one in results:
        table.add_row(
            f"{one.temperature:g}",
            one.way,
            str(one.num_tokens),
            str(one.num_steps),
            f"{one.largest_shift:.2g}",
            str(len(one.divergences)),
        )
    return table


def divergences_table(examination: Examination, divergences: Sequence[Divergence]) -> Table:
    """One row for each divergence, those with the largest margins first; not more than 20."""
    table = _table("Divergences, by margin in units of logits")
    for name in ("prompt", "token", "T", "verified with", "plain", "verified", "margin", "bound", ""):
        table.add_column(name, justify="right" if name in ("prompt", "token", "margin", "bound") else "left")
    ordered = sorted(divergences, key=lambda one: one.margin / one.bound if one.bound else one.margin, reverse=True)
    for one in ordered[:_MAX_SHOWN_DIVERGENCES]:
        table.add_row(
            str(one.prompt_index),
            str(one.position),
            f"{one.temperature:g}",
            one.way,
            _token(examination, one.plain.token_id),
            _token(examination, one.verified.token_id),
            f"{one.margin:.3g}",
            f"{one.bound:.3g}",
            "rounding" if one.is_explained else "[bold red]NOT ROUNDING[/]",
        )
    return table


def equality_lines(measured: Measured) -> list[str]:
    """The verdict, and the bound that it rests on."""
    num_tokens = sum(one.num_tokens for one in measured.verified)
    divergences = [one for result in measured.verified for one in result.divergences]
    beyond = unexplained(measured.verified)
    rounding = measured.rounding
    if not divergences:
        lines = [f"All {num_tokens} verified tokens are those of plain decoding, in {rounding.dtype}."]
    else:
        lines = [
            f"{len(divergences)} of {num_tokens} verified tokens are not those of plain decoding, in {rounding.dtype}; "
            f"rounding explains {len(divergences) - len(beyond)} of them."
        ]
    lines.append(
        f"Rounding explains margins up to 6 u sqrt(N / 3) s + 2 ulp(m): u = {rounding.unit:.2g}, N = "
        f"{rounding.num_roundings}, s the spread of the row's logits, m the logit's magnitude (docs/doctor.md)."
    )
    return lines


def report_object(examination: Examination) -> dict[str, object]:
    """All of it for ``--json``."""
    target, draft = examination.models
    return {
        "target": asdict(target),
        "draft": asdict(draft),
        "memory": [_memory_object(model) for model in examination.memory],
        "findings": [
            {"check": one.check, "level": one.level.value, "message": one.message} for one in examination.findings
        ],
        **({} if examination.measured is None else _measured_object(examination, examination.measured)),
    }


def _memory_object(model: ModelMemory) -> dict[str, object]:
    return {**asdict(model), "pool_bytes": model.pool_bytes, "needed_bytes": model.needed_bytes}


def _measured_object(examination: Examination, measured: Measured) -> dict[str, object]:
    return {
        "target_step_s": {str(size): step_s for size, step_s in measured.times.target_s.items()},
        "draft_step_s": measured.times.draft_s,
        "predictions": [{**asdict(one), "best_k": one.best.k} for one in measured.predictions],
        "rounding": {
            **asdict(measured.rounding),
            "unit": measured.rounding.unit,
            "num_roundings": measured.rounding.num_roundings,
        },
        "verified": [_verified_object(examination, one) for one in measured.verified],
    }


def _verified_object(examination: Examination, result: Verified) -> dict[str, object]:
    return {
        "way": result.way,
        "temperature": result.temperature,
        "num_tokens": result.num_tokens,
        "num_steps": result.num_steps,
        "largest_shift": result.largest_shift,
        "divergences": [_divergence_object(examination, one) for one in result.divergences],
    }


def _divergence_object(examination: Examination, one: Divergence) -> dict[str, object]:
    def score(token: TokenScore) -> dict[str, object]:
        return {**asdict(token), "token": examination.token_text(token.token_id)}

    return {
        "prompt_index": one.prompt_index,
        "position": one.position,
        "plain": score(one.plain),
        "verified": score(one.verified),
        "margin": one.margin,
        "shift": one.shift,
        "spread": one.spread,
        "bound": one.bound,
        "explained": one.is_explained,
    }


def _token(examination: Examination, token_id: int) -> str:
    return escape(f"{examination.token_text(token_id)!r}")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
