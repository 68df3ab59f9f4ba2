"""``outrider doctor``: is this a pair, what is it worth, and are the tokens equal?"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from outrider.bench.machine import num_cores
from outrider.bench.stages import read_prompts
from outrider.display import Progress
from outrider.doctor.compatibility import Level
from outrider.doctor.divergence import unexplained
from outrider.doctor.settings import DoctorSettings
from outrider.failures import CommandFailed
from outrider.launcher import chosen_pair, share_of_cores
from outrider.options import with_settings

if TYPE_CHECKING:
    from outrider.doctor.examination import Examination


@with_settings(DoctorSettings, "doctor")
def doctor(settings: DoctorSettings) -> None:
    """Examine a pair: compatibility, memory, speedup per K, equality.

    Loads both models here, and ends with 1 if they are no pair, or if verifying drafts gives other tokens than plain
    decoding by more than rounding explains.
    """
    target, draft = chosen_pair(settings.target, settings.draft)
    assert draft is not None
    prompts = read_prompts(settings.prompt_file)[: settings.prompts]
    num_threads = settings.threads or share_of_cores(num_cores(), drafting=True)[0]
    from outrider.doctor.examination import examine  # brings torch

    with Progress() as progress:
        examination = examine(settings, (target, draft), prompts, num_threads, lambda s: progress.show("doctor", s))
    if settings.as_json:
        from outrider.doctor.report import report_object

        typer.echo(json.dumps(report_object(examination), ensure_ascii=False))
    else:
        _show(examination)
    _judge(examination)


def _show(examination: Examination) -> None:
    from outrider.doctor import report

    console = Console(highlight=False)
    if not console.is_terminal or console.width > report.WIDTH:
        console.width = report.WIDTH
    console.print(report.findings_table(examination.findings))
    console.print(report.memory_table(examination.memory))
    measured = examination.measured
    if measured is None:
        return
    for predictions in measured.predictions:
        console.print(report.prediction_table(predictions, measured))
        for line in report.prediction_lines(predictions, measured):
            console.print(line)
        console.print()
    console.print(report.equality_table(measured.verified))
    divergences = [one for result in measured.verified for one in result.divergences]
    if divergences:
        console.print(report.divergences_table(examination, divergences))
    for line in report.equality_lines(measured):
        console.print(line)


def _judge(examination: Examination) -> None:
    """Raises `CommandFailed` unless this is a pair whose tokens are plain decoding's."""
    sys.stdout.flush()
    problems = [finding.message for finding in examination.findings if finding.level is Level.PROBLEM]
    if problems:
        raise CommandFailed("; ".join(problems))
    beyond = unexplained(examination.measured.verified) if examination.measured is not None else []
    if beyond:
        worst = max(beyond, key=lambda one: one.margin)
        raise CommandFailed(
            f"{len(beyond)} tokens differ from plain decoding's by more than rounding explains, this is a defect; the "
            f"worst: prompt {worst.prompt_index}, token {worst.position}, temperature {worst.temperature:g}, "
            f"{worst.way}: margin {worst.margin:.3g}, bound {worst.bound:.3g}"
        )
