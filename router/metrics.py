"""What a router counts, and what its workers told it, for Prometheus. Its own registry: a process may hold several.

Knows the names and units of metrics; knows nothing of how a stream runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from switchyard.v1.worker_pb2 import WorkerLoad

from router.dispatch import Dispatcher
from router.generation import Account
from router.policy import Placement
from router.streams import HandOff

_LATENCIES_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_LABELS = ("worker", "pool", "role")

# Fields of WorkerLoad as they are, by kind.
_GAUGES = {
    "num_running": "Requests in the worker's running batch.",
    "num_waiting": "Requests waiting for a place in the batch.",
    "num_waiting_for_kv": "Decode requests waiting for KV blocks.",
    "num_free_blocks": "KV blocks that can be allocated now.",
    "num_queued_tokens": "Prompt tokens accepted and not yet computed.",
}
_COUNTERS = {
    "num_steps": "Engine steps done.",
    "num_computed_prompt_tokens": "Prompt tokens computed.",
    "num_cached_prompt_tokens": "Prompt tokens taken from the device prefix cache, or from the tiers.",
    "num_recomputed_prompt_tokens": "Prompt tokens computed by decode requests because blocks were missing or bad.",
    "num_generated_tokens": "Tokens generated.",
    "num_preemptions": "Requests preempted for want of blocks.",
    "num_published_blocks": "KV blocks published.",
    "num_transferred_blocks": "KV blocks pulled, verified and used.",
    "num_prefixes_fetched": "Prefixes that only the tiers had and that were pulled, because that was cheaper.",
    "num_prefixes_recomputed": "Prefixes that only the tiers had and that were computed again: that was cheaper.",
    "num_useless_prefetched_fragments": "KV fragments prefetched for requests that did not use them.",
}
_LABELLED_COUNTERS = {
    "num_rejected_fragments": ("reason", "KV fragments rejected."),
    "pulled_bytes": ("tier", "Bytes of KV pulled."),
    "published_bytes": ("tier", "Bytes of KV published."),
    "num_prefetched_fragments": ("tier", "KV fragments brought to the host for queued requests."),
    "prefetched_bytes": ("tier", "Bytes of them."),
}


class Metrics:
    """Counts requests and streams; observer of both generation and dispatch."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("switchyard_requests", "Requests ended, by outcome.", ("outcome",))
        self._placements = self._counter("switchyard_placements", "First placements, by kind.", ("kind",))
        self._replacements = self._counter("switchyard_replacements", "Streams placed anew after losing a worker.")
        self._dropped = self._counter("switchyard_dropped_frames", "Token frames dropped: old epoch, or doubled.")
        self._snapshots = self._counter("switchyard_block_snapshots", "Times that a worker told all blocks it holds.")
        self._gaps = self._counter("switchyard_block_gaps", "Times that news of a worker's blocks were missed.")
        self._resumed = self._counter("switchyard_resumed_streams", "Streams that a client came back for.")
        self._prompt_tokens = self._counter("switchyard_prompt_tokens", "Prompt tokens of requests ended.")
        self._output_tokens = self._counter("switchyard_output_tokens", "Tokens given to clients.")
        self._ttft = self._histogram("switchyard_ttft_seconds", "From arrival to the first token.")
        self._predicted = self._histogram("switchyard_ttft_predicted_seconds", "What the placement predicted for it.")
        self._tpot = self._histogram("switchyard_tpot_seconds", "Between tokens, the mean of each stream.")
        self._queue = self._histogram("switchyard_queue_seconds", "From arrival to the first placement.")
        self._hand_off = self._histogram(
            "switchyard_handoff_seconds", "From the end of a prefill's last chunk to its decode worker's first step."
        )
        self._relay = self._histogram(
            "switchyard_handoff_relay_seconds", "Of a hand-off: until the decode worker's engine was told to go on."
        )
        self._duration = self._histogram("switchyard_request_seconds", "From arrival to the end of served requests.")

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def watch(
        self,
        dispatcher: Dispatcher,
        num_inflight: Callable[[], int],
        is_directory_up: Callable[[], bool],
        is_journal_up: Callable[[], bool],
    ) -> None:
        """Show what these say at the time of each scrape."""
        inflight = Gauge("switchyard_inflight_requests", "Requests admitted and not ended.", registry=self.registry)
        inflight.set_function(num_inflight)
        directory = Gauge("switchyard_directory_up", "Whether the directory answers.", registry=self.registry)
        directory.set_function(lambda: float(is_directory_up()))
        journal = Gauge("switchyard_journal_up", "Whether streams can be resumed.", registry=self.registry)
        journal.set_function(lambda: float(is_journal_up()))
        self.registry.register(_WorkerMetrics(dispatcher))

    # -- RequestObserver

    def ended(self, account: Account) -> None:
        self._requests.labels(account.outcome).inc()
        self._prompt_tokens.inc(account.num_prompt_tokens)
        stats = account.stats
        if account.outcome in ("stop", "length"):
            self._duration.observe(stats.duration_s)
            if account.num_output_tokens > 1:
                self._tpot.observe((stats.duration_s - stats.ttft_s) / (account.num_output_tokens - 1))

    def refused(self, outcome: str) -> None:
        """An API refused a call before it was a request: bad JSON, an unknown field or path."""
        self.ended(Account(outcome))

    def gave_tokens(self, num_tokens: int) -> None:
        self._output_tokens.inc(num_tokens)

    def resumed(self) -> None:
        self._resumed.inc()

    # -- DispatchObserver

    def placed(self, placement: Placement, queue_s: float) -> None:
        self._placements.labels("whole" if placement.prefill_id is None else "prefill_decode").inc()
        self._queue.observe(queue_s)

    def replaced(self) -> None:
        self._replacements.inc()

    def first_token(self, ttft_s: float, predicted_s: float) -> None:
        self._ttft.observe(ttft_s)
        self._predicted.observe(predicted_s)

    def closed(self, num_dropped_frames: int, hand_off: HandOff | None) -> None:
        self._dropped.inc(num_dropped_frames)
        if hand_off is not None:
            self._relay.observe(hand_off.relay_s)
            self._hand_off.observe(hand_off.total_s)

    def block_snapshot(self) -> None:
        self._snapshots.inc()

    def block_gap(self) -> None:
        self._gaps.inc()

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_LATENCIES_S, registry=self.registry)


class _WorkerMetrics(Collector):
    """One row per live worker, from its last load report."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterable[Metric]:
        infos = self._dispatcher.fleet.workers
        rows = [
            ((info.worker_id, info.pool, info.role.value), self._dispatcher.loads.get(info.worker_id)) for info in infos
        ]
        up = GaugeMetricFamily("switchyard_worker_up", "1 for each worker that takes requests.", labels=_LABELS)
        for labels, _ in rows:
            up.add_metric(labels, 1)
        yield up
        known = GaugeMetricFamily(
            "switchyard_worker_known_blocks",
            "KV blocks that the worker said it holds; absent while guessed.",
            labels=_LABELS,
        )
        for labels, _ in rows:
            if (num_told := self._dispatcher.fleet.num_told_blocks(labels[0])) is not None:
                known.add_metric(labels, num_told)
        yield known
        yield from _families([(labels, load) for labels, load in rows if load is not None])


def _families(rows: list[tuple[tuple[str, ...], WorkerLoad]]) -> Iterable[Metric]:
    for field, text in _GAUGES.items():
        gauge = GaugeMetricFamily(f"switchyard_worker_{_short(field)}", text, labels=_LABELS)
        for labels, load in rows:
            gauge.add_metric(labels, getattr(load, field))
        yield gauge
    for field, text in _COUNTERS.items():
        counter = CounterMetricFamily(f"switchyard_worker_{_short(field)}", text, labels=_LABELS)
        for labels, load in rows:
            counter.add_metric(labels, getattr(load, field))
        yield counter
    for field, (label, text) in _LABELLED_COUNTERS.items():
        counter = CounterMetricFamily(f"switchyard_worker_{_short(field)}", text, labels=(*_LABELS, label))
        for labels, load in rows:
            for key, value in getattr(load, field).items():
                counter.add_metric((*labels, key), value)
        yield counter
    tiers = GaugeMetricFamily("switchyard_worker_tier_up", "Whether a tier answers.", labels=(*_LABELS, "tier"))
    works = GaugeMetricFamily(
        "switchyard_worker_tier_ok",
        "Whether a tier does all that it should; /readyz says why not.",
        labels=(*_LABELS, "tier"),
    )
    for labels, load in rows:
        for tier, is_up in load.tier_is_up.items():
            tiers.add_metric((*labels, tier), float(is_up))
            works.add_metric((*labels, tier), float(is_up and tier not in load.tier_problems))
    yield tiers
    yield works


def _short(field: str) -> str:
    return field.removeprefix("num_")
