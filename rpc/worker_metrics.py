"""The metrics that both kinds of worker have. Counted on the model thread, once per step."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from speculation.messages import ModelInfo, SessionErrorCode
from telemetry.buckets import STEP_S, batch_size_label


class WorkerMetrics:
    """One registry for one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._info = self.gauge("worker_info", "What the worker serves; always 1.", "model_name", "dtype", "device")
        self._step_s = Histogram(
            "outrider:step_seconds",
            "Forward pass and draws, by what was in it and for how many sequences at most.",
            ("kind", "batch_size"),
            buckets=STEP_S,
            registry=self.registry,
        )
        self._steps: dict[tuple[str, int], Histogram] = {}
        self._session_failures = self.counter("session_failures", "Sessions that the worker gave up.", "code")
        for code in SessionErrorCode:
            self._session_failures.labels(code.value)

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"outrider:{name}", text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"outrider:{name}", text, labels, registry=self.registry)

    def describe(self, info: ModelInfo) -> None:
        """The model is known."""
        self._info.labels(info.name, info.dtype, info.device).set(1)

    def watch(self, num_sessions: Callable[[], int], num_free_tokens: Callable[[], int]) -> None:
        """From now on a scrape reads both; ``num_free_tokens`` of an empty cache is its size."""
        size = max(1, num_free_tokens())
        sessions = self.gauge("num_sessions", "Sessions that the worker holds.")
        sessions.set_function(num_sessions)
        usage = self.gauge("kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.")
        usage.set_function(lambda: 1 - num_free_tokens() / size)

    def step(self, kind: str, num_sequences: int, step_s: float) -> None:
        """One forward pass over ``num_sequences``."""
        child = self._steps.get((kind, num_sequences))
        if child is None:
            child = self._step_s.labels(kind, batch_size_label(num_sequences))
            self._steps[kind, num_sequences] = child
        child.observe(step_s)

    def session_failed(self, code: SessionErrorCode) -> None:
        self._session_failures.labels(code.value).inc()
