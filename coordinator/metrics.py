"""The coordinator's metrics.

What requests did is taken from their own `SessionStats` when somebody scrapes: of those that are over, added up, and of
those under way. So the counters are the sums of what the requests were told, whatever became of them, and cost nothing
between two scrapes. Durations go into histograms as they end. docs/metrics.md has the list.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from coordinator.arms import Arm
from coordinator.meters import Histograms
from coordinator.session import Session
from coordinator.traffic import FrameCount, Traffic
from rpc.errors import OutriderError
from speculation.messages import FinishReason
from speculation.session_stats import SessionStats
from telemetry import buckets

K_BUCKETS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64)

_LABELS = ("model_name", "arm")

_HISTOGRAMS = {
    "queue": ("request_queue_time_seconds", "From arrival to a place at a target.", buckets.REQUEST_S),
    "prefill": ("request_prefill_time_seconds", "From a place at a target to the first token.", buckets.REQUEST_S),
    "first_token": ("time_to_first_token_seconds", "From arrival to the first token.", buckets.FIRST_TOKEN_S),
    "inter_token": ("inter_token_latency_seconds", "Between two steps that committed tokens.", buckets.INTER_TOKEN_S),
    "decode": ("request_decode_time_seconds", "From the first token to the last.", buckets.REQUEST_S),
    "per_output_token": (
        "request_time_per_output_token_seconds",
        "Decode time for each token after the first, a request's mean.",
        buckets.INTER_TOKEN_S,
    ),
    "end_to_end": ("e2e_request_latency_seconds", "From arrival to the end.", buckets.REQUEST_S),
    "prompt_tokens": ("request_prompt_tokens", "Tokens of a prompt.", buckets.TOKENS),
    "generation_tokens": ("request_generation_tokens", "Tokens of an answer.", buckets.TOKENS),
    "draft_round_trip": (
        "draft_round_trip_seconds",
        "From a miss that no branch caught to the first proposal that knows of it.",
        buckets.STEP_S,
    ),
}

_STAT_COUNTERS: dict[str, tuple[str, Callable[[SessionStats], int]]] = {
    "spec_decode_num_drafts": ("Verify steps with drafted tokens.", lambda stats: stats.num_drafts),
    "spec_decode_num_draft_tokens": ("Drafted tokens verified.", lambda stats: stats.num_drafted),
    "spec_decode_num_accepted_tokens": ("Drafted tokens accepted.", lambda stats: stats.num_accepted),
    "lookup_tokens": ("Tokens looked up in the sequence and verified.", lambda stats: stats.num_looked_up),
    "lookup_tokens_accepted": ("Of these, accepted.", lambda stats: stats.num_looked_up_accepted),
    "generation_tokens": ("Tokens generated.", lambda stats: stats.num_committed),
    "decode_steps": ("Steps that committed tokens, of each session.", lambda stats: stats.num_steps),
    "free_run_steps": ("Steps without drafted tokens.", lambda stats: stats.num_free_run_steps),
    "draft_tokens_proposed": ("Drafted tokens that drafters sent.", lambda stats: stats.num_proposed),
    "draft_tokens_dropped": ("Drafted tokens that were of no use.", lambda stats: stats.num_dropped),
    "draft_misses": ("Steps that contradicted what was drafted.", lambda stats: stats.num_misses),
    "branch_catches": ("Misses after which a branch went on.", lambda stats: stats.num_caught),
    "fallbacks": ("Sessions that lost their drafter and went on plainly.", lambda stats: stats.num_draft_losses),
    "target_losses": ("Sessions that lost their target and were replayed.", lambda stats: stats.num_target_losses),
}


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker now. ``role`` is "target" or "draft", ``name`` its address."""

    role: str
    name: str
    is_up: bool
    num_sessions: int


@dataclass(frozen=True, slots=True)
class LiveState:
    """A coordinator now; read on its event loop."""

    model_name: str
    """Empty before the first target is known."""
    max_k: int
    sessions: Collection[Session]
    num_waiting: int
    workers: Sequence[WorkerState]
    traffic: Traffic
    num_resting: int
    """Pairs of a target and a draft model of which plain decoding has measured faster than speculation."""


@dataclass(slots=True)
class _Totals:
    """Of the requests of one arm."""

    stats: SessionStats = field(default_factory=SessionStats)
    num_prompt_tokens: int = 0

    def add(self, session: Session) -> None:
        if session.was_placed:
            self.stats.add(session.stats)
            self.num_prompt_tokens += len(session.job.prompt_token_ids)

    def copy(self) -> _Totals:
        copied = _Totals(num_prompt_tokens=self.num_prompt_tokens)
        copied.stats.add(self.stats)
        return copied


class CoordinatorMetrics:
    """One registry for one coordinator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._over: defaultdict[Arm, _Totals] = defaultdict(_Totals)
        self._histograms = {
            key: Histogram(f"outrider:{name}", text, _LABELS, buckets=edges, registry=self.registry)
            for key, (name, text, edges) in _HISTOGRAMS.items()
        }
        self._by_arm: dict[tuple[str, Arm], Histograms] = {}
        self._successes = self._counter("request_success", "Requests that ended well.", "finished_reason")
        self._failures = self._counter("request_failure", "Requests that did not, or were refused.", "reason")

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"outrider:{name}", text, ("model_name", label), registry=self.registry)

    def watch(self, read: Callable[[], LiveState]) -> None:
        """From now on a scrape reads the coordinator too."""
        self.registry.register(_Scrape(read, self._over))

    def histograms(self, model_name: str, arm: Arm) -> Histograms:
        """Where the sessions of an arm put their times."""
        known = self._by_arm.get((model_name, arm))
        if known is None:
            children = {key: metric.labels(model_name, arm.value).observe for key, metric in self._histograms.items()}
            known = self._by_arm[model_name, arm] = Histograms(**children)
            for reason in FinishReason:
                self._successes.labels(model_name, reason.value)  # from the start, so that a rate is known
        return known

    def session_over(self, session: Session, model_name: str) -> None:
        """A session that was under way is not any more."""
        self._over[session.arm].add(session)
        session.meter.on_over(
            session.arrived_s,
            session.placed_s,
            session.over_s,
            len(session.job.prompt_token_ids),
            session.stats.num_committed,
        )
        if session.finish_reason is not None:
            self._successes.labels(model_name, session.finish_reason.value).inc()
        else:
            self._failures.labels(model_name, session.outcome).inc()

    def refused(self, error: OutriderError, model_name: str) -> None:
        """A request that never became a session."""
        self._failures.labels(model_name, error.reason).inc()


class _Scrape:
    """Collects what is not counted by itself."""

    def __init__(self, read: Callable[[], LiveState], over: defaultdict[Arm, _Totals]) -> None:
        self._read = read
        self._over = over

    def describe(self) -> list[Metric]:
        """Nothing is read before there is something to read."""
        return []

    def collect(self) -> Iterator[Metric]:
        state = self._read()
        totals = {arm: self._over[arm].copy() for arm in Arm}
        for session in state.sessions:
            totals[session.arm].add(session)
        yield from _stat_counters(state, totals)
        yield from _request_gauges(state)
        yield from _worker_gauges(state)
        yield from _frame_counters(state.traffic)


def _stat_counters(state: LiveState, totals: dict[Arm, _Totals]) -> Iterator[Metric]:
    for name, (text, value) in _STAT_COUNTERS.items():
        family = CounterMetricFamily(f"outrider:{name}", text, labels=_LABELS)
        for arm, total in totals.items():
            family.add_metric((state.model_name, arm.value), value(total.stats))
        yield family
    prompts = CounterMetricFamily("outrider:prompt_tokens", "Tokens of admitted prompts.", labels=_LABELS)
    per_position = CounterMetricFamily(
        "outrider:spec_decode_num_accepted_tokens_per_pos",
        "Drafted tokens accepted, by their place among those verified together, from 0.",
        labels=(*_LABELS, "position"),
    )
    ks = HistogramMetricFamily("outrider:spec_decode_k", "Cap on drafted tokens of each step.", labels=_LABELS)
    for arm, total in totals.items():
        labels = (state.model_name, arm.value)
        prompts.add_metric(labels, total.num_prompt_tokens)
        for position in range(max([state.max_k, *total.stats.steps_by_accepted])):
            per_position.add_metric((*labels, str(position)), total.stats.num_accepted_at(position))
        ks.add_metric(labels, _k_buckets(total.stats), total.stats.sum_k)
    yield from (prompts, per_position, ks)


def _k_buckets(stats: SessionStats) -> list[tuple[str, float]]:
    counts = [(f"{edge:.1f}", sum(n for k, n in stats.steps_by_k.items() if k <= edge)) for edge in K_BUCKETS]
    return [*counts, ("+Inf", stats.num_steps)]


def _request_gauges(state: LiveState) -> Iterator[Metric]:
    num_running = sum(session.target is not None for session in state.sessions)
    for name, text, value in (
        ("num_requests_running", "Requests that have a target.", num_running),
        ("num_requests_waiting", "Requests that wait for one.", state.num_waiting),
        ("speculation_resting", "Pairs of models with which plain decoding has measured faster.", state.num_resting),
    ):
        family = GaugeMetricFamily(f"outrider:{name}", text, labels=("model_name",))
        family.add_metric((state.model_name,), value)
        yield family


def _worker_gauges(state: LiveState) -> Iterator[Metric]:
    up = GaugeMetricFamily("outrider:worker_up", "1 while the worker is connected.", labels=("role", "worker"))
    held = GaugeMetricFamily("outrider:worker_sessions", "Sessions at the worker.", labels=("role", "worker"))
    for worker in state.workers:
        up.add_metric((worker.role, worker.name), worker.is_up)
        held.add_metric((worker.role, worker.name), worker.num_sessions)
    yield from (up, held)


def _frame_counters(traffic: Traffic) -> Iterator[Metric]:
    labels = ("role", "direction")
    frames = CounterMetricFamily("outrider:frames", "Frames to and from workers of a role.", labels=labels)
    size = CounterMetricFamily("outrider:frame_bytes", "Bytes of these frames, serialized.", labels=labels)
    steps = CounterMetricFamily("outrider:target_steps", "Steps that targets told of.", value=traffic.num_target_steps)
    counts: tuple[tuple[str, FrameCount], ...] = (("target", traffic.target), ("draft", traffic.draft))
    for role, count in counts:
        frames.add_metric((role, "sent"), count.num_sent)
        frames.add_metric((role, "received"), count.num_received)
        size.add_metric((role, "sent"), count.num_sent_bytes)
        size.add_metric((role, "received"), count.num_received_bytes)
    yield from (frames, size, steps)
