"""docs/metrics.md, the dashboard and the alert rules speak of the metrics that there are, and of all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from coordinator.arms import Arm
from coordinator.coordinator import Coordinator
from coordinator.in_process import InProcessClient
from coordinator.settings import CoordinatorSettings
from draft_worker.metrics import DraftMetrics
from rpc.errors import Cancelled
from speculation.messages import ModelInfo
from target_worker.metrics import TargetMetrics
from tests.doubles.scripted_workers import ScriptedDrafter, ScriptedTarget

ROOT = Path(__file__).resolve().parents[2]
METRIC = re.compile(r"outrider:[a-z0-9_]+")
SUFFIXES = ("_bucket", "_count", "_sum")
GIVEN_BY_PROMETHEUS = {"le", "job", "instance"}


@pytest.fixture
async def registries() -> list[CollectorRegistry]:
    """One of each role, with something in every metric."""
    settings = CoordinatorSettings(targets=("in-process:0",))
    clients = [InProcessClient(ScriptedTarget())], [InProcessClient(ScriptedDrafter())]
    coordinator = Coordinator(settings, *clients)
    for arm in Arm:
        coordinator.metrics.histograms("m", arm)
    coordinator.metrics.refused(Cancelled(""), "m")
    target, draft = TargetMetrics(), DraftMetrics()
    for worker in (target, draft):
        worker.describe(ModelInfo("m", 1, 1, (), 1, "float32", "cpu", b"", 1))
        worker.watch(lambda: 0, lambda: 1)
        worker.step("prefill", 1, 0.1)
    return [coordinator.metrics.registry, target.registry, draft.registry]


def exported(registries: list[CollectorRegistry]) -> dict[str, set[str]]:
    """Labels by name as documents say it: a histogram once, a counter with its ``_total``."""
    found: dict[str, set[str]] = {}
    for metric in (metric for registry in registries for metric in registry.collect()):
        if metric.name.startswith("outrider:"):
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            labels = {label for sample in metric.samples for label in sample.labels if label != "le"}
            found.setdefault(name, set()).update(labels)
    return found


def documented() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `(outrider:\w+)` \|([^|]*)\|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows), "a metric is listed twice"
    return {name: {label.strip() for label in labels.split(",") if label.strip()} for name, labels in rows}


def test_the_document_lists_every_metric_with_its_labels(registries: list[CollectorRegistry]) -> None:
    assert documented() == exported(registries)


def expressions() -> Iterator[tuple[str, str]]:
    """Where, and the PromQL."""
    dashboard = json.loads((ROOT / "docker/grafana/outrider.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']}", target["expr"]
    for group in yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    for block in re.findall(r"```promql\n(.*?)```", (ROOT / "docs/metrics.md").read_text(), re.DOTALL):
        yield "docs/metrics.md", block


def recorded() -> set[str]:
    groups = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def test_dashboard_and_rules_ask_only_for_what_is_there(registries: list[CollectorRegistry]) -> None:
    samples = {s.name for registry in registries for metric in registry.collect() for s in metric.samples}
    asked = {(where, name) for where, expression in expressions() for name in METRIC.findall(expression)}

    assert len(asked) > 50
    assert {(where, name) for where, name in asked if name not in samples | recorded()} == set()


def test_dashboard_and_rules_use_only_labels_that_are_there(registries: list[CollectorRegistry]) -> None:
    known = exported(registries)
    for where, expression in expressions():
        labels = set().union(*(known[base(name, known)] for name in METRIC.findall(expression) if base(name, known)))
        used = {
            label for match in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)\s*[=!]", match)
        }
        for names in re.findall(r"\b(?:by|ignoring|on) ?\(([^)]*)\)", expression):
            used |= {name.strip() for name in names.split(",")}
        assert used <= labels | GIVEN_BY_PROMETHEUS, where


def base(name: str, known: dict[str, set[str]]) -> str:
    """The metric that a sample belongs to; empty for one that the rules record."""
    if name in known:
        return name
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.removesuffix(suffix) in known), "")


def test_the_dashboard_shows_every_metric_or_the_rules_watch_it(registries: list[CollectorRegistry]) -> None:
    known = exported(registries)
    shown = {base(name, known) for _, expression in expressions() for name in METRIC.findall(expression)}

    assert set(known) - shown <= NOT_SHOWN


NOT_SHOWN = {
    "outrider:worker_info",
    "outrider:worker_sessions",
    "outrider:session_failures_total",
    "outrider:target_steps_total",
    "outrider:request_prefill_time_seconds",
    "outrider:request_decode_time_seconds",
    "outrider:request_prompt_tokens",
    "outrider:request_generation_tokens",
}
"""For questions that come up less often."""


def test_the_scrape_example_names_the_rules_and_the_jobs_that_they_ask_for() -> None:
    scrape = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())

    assert [(ROOT / "docker/prometheus" / name).is_file() for name in scrape["rule_files"]] == [True]
    assert all(re.fullmatch("outrider-.*", config["job_name"]) for config in scrape["scrape_configs"])


def test_the_speedup_of_the_document_is_the_one_of_the_rules() -> None:
    first = re.search(r"```promql\n(.*?)```", (ROOT / "docs/metrics.md").read_text(), re.DOTALL)
    rules = (ROOT / "docker/prometheus/alerts.yml").read_text()
    assert first is not None
    rule = next(r["expr"] for g in yaml.safe_load(rules)["groups"] for r in g["rules"] if r.get("record"))

    assert _bare(first[1]) == _bare(rule.replace("sum by (model_name)", "sum"))


def _bare(expression: str) -> str:
    return re.sub(r"\s", "", expression)
