"""What a registry says, as numbers."""

from __future__ import annotations

from collections import Counter

from prometheus_client import CollectorRegistry


def total(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """The sum of the samples of this name, without its ``outrider:``, that have these labels."""
    samples = (sample for metric in registry.collect() for sample in metric.samples)
    return sum(s.value for s in samples if s.name == f"outrider:{name}" and labels.items() <= s.labels.items())


def by_label(registry: CollectorRegistry, name: str, label: str) -> dict[str, float]:
    """The same for each value of a label."""
    found: Counter[str] = Counter()
    for metric in registry.collect():
        for sample in metric.samples:
            if sample.name == f"outrider:{name}":
                found[sample.labels[label]] += sample.value
    return dict(found)
