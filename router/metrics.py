"""What a router counts, and what its workers report, for Prometheus. Its own registry: a process may hold several.

Names, units and buckets are declared in `telemetry`. Knows nothing of how a stream runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from switchyard.v1.worker_pb2 import WorkerLoad

from router.adapters.catalog import AdapterCatalog
from router.placement.policy import Placement
from router.placement.streams import KVTransfer
from router.service.dispatch import Dispatcher
from router.service.generation import Account
from telemetry import router as declared
from telemetry import worker
from telemetry.metric import Kind, samples
from telemetry.metric import Metric as Declared


class Metrics:
    """Counts requests and streams; observer of both generation and dispatch."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter(declared.REQUESTS)
        for outcome in declared.FAILURES:
            self._requests.labels(outcome)
        self._placements = self._counter(declared.PLACEMENTS)
        self._replacements = self._counter(declared.REPLACEMENTS)
        self._dropped = self._counter(declared.DROPPED_FRAMES)
        self._snapshots = self._counter(declared.BLOCK_SNAPSHOTS)
        self._gaps = self._counter(declared.BLOCK_GAPS)
        self._resumed = self._counter(declared.RESUMED_STREAMS)
        self._prompt_tokens = self._counter(declared.PROMPT_TOKENS)
        self._output_tokens = self._counter(declared.OUTPUT_TOKENS)
        self._ttft = self._histogram(declared.TIME_TO_FIRST)
        self._predicted = self._histogram(declared.PREDICTED_TIME_TO_FIRST)
        self._tpot = self._histogram(declared.TIME_PER_OUTPUT)
        self._queue = self._histogram(declared.QUEUE)
        self._kv_transfer = self._histogram(declared.KV_TRANSFER)
        self._relay = self._histogram(declared.KV_TRANSFER_RELAY)
        self._duration = self._histogram(declared.DURATION)
        self._adapter_requests = self._counter(declared.ADAPTER_REQUESTS)
        self._adapter_loads = self._counter(declared.ADAPTER_LOADS)
        self._adapter_labels: set[str] = set()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def watch(
        self,
        dispatcher: Dispatcher,
        num_inflight: Callable[[], int],
        is_directory_up: Callable[[], bool],
        is_journal_up: Callable[[], bool],
        adapters: AdapterCatalog,
    ) -> None:
        """Show what these say at the time of each scrape."""
        self._gauge(declared.INFLIGHT_REQUESTS, num_inflight)
        self._gauge(declared.DIRECTORY_UP, is_directory_up)
        self._gauge(declared.JOURNAL_UP, is_journal_up)
        self._gauge(declared.ADAPTERS, lambda: len(adapters.served))
        self._gauge(declared.ADAPTER_REGISTRY_UP, lambda: adapters.is_up)
        self.registry.register(_WorkerMetrics(dispatcher))

    # -- RequestObserver

    def ended(self, account: Account) -> None:
        self._requests.labels(account.outcome).inc()
        self._prompt_tokens.inc(account.num_prompt_tokens)
        if account.is_adapter:
            self._adapter_requests.labels(self._adapter_label(account.model)).inc()
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

    def _adapter_label(self, name: str) -> str:
        """A name that any caller may choose must not make series without end."""
        if name not in self._adapter_labels and len(self._adapter_labels) >= declared.MAX_ADAPTER_LABELS:
            return declared.OTHER_ADAPTERS
        self._adapter_labels.add(name)
        return name

    # -- LoadObserver

    def adapter_loaded(self, outcome: str) -> None:
        self._adapter_loads.labels(outcome).inc()

    # -- DispatchObserver

    def placed(self, placement: Placement, queue_s: float) -> None:
        self._placements.labels("whole" if placement.prefill_id is None else "prefill_decode").inc()
        self._queue.observe(queue_s)

    def replaced(self) -> None:
        self._replacements.inc()

    def first_token(self, ttft_s: float, predicted_s: float) -> None:
        self._ttft.observe(ttft_s)
        self._predicted.observe(predicted_s)

    def closed(self, num_dropped_frames: int, kv_transfer: KVTransfer | None) -> None:
        self._dropped.inc(num_dropped_frames)
        if kv_transfer is not None:
            self._relay.observe(kv_transfer.relay_s)
            self._kv_transfer.observe(kv_transfer.total_s)

    def block_snapshot(self) -> None:
        self._snapshots.inc()

    def block_gap(self) -> None:
        self._gaps.inc()

    def _counter(self, metric: Declared) -> Counter:
        return Counter(metric.name, metric.meaning, metric.labels, registry=self.registry)

    def _gauge(self, metric: Declared, value: Callable[[], float]) -> None:
        Gauge(metric.name, metric.meaning, registry=self.registry).set_function(lambda: float(value()))

    def _histogram(self, metric: Declared) -> Histogram:
        return Histogram(metric.name, metric.meaning, buckets=metric.buckets, registry=self.registry)


Row = tuple[tuple[str, ...], WorkerLoad]
"""A worker's values of worker.LABELS, and its last load report."""


class _WorkerMetrics(Collector):
    """One row per live worker, from its last load report."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterable[Metric]:
        fleet, loads = self._dispatcher.fleet, self._dispatcher.loads
        labels = [(info.worker_id, info.pool, info.role.value) for info in fleet.workers]
        yield _family(worker.UP, [(row, 1) for row in labels])
        known = [(row, fleet.num_reported_blocks(row[0])) for row in labels]
        yield _family(
            worker.KNOWN_BLOCKS, [(row, num_reported) for row, num_reported in known if num_reported is not None]
        )
        rows = [(row, loads[row[0]]) for row in labels if row[0] in loads]
        for metric in (*worker.ENGINE, *worker.SPECULATION, *worker.DEMAND, *worker.STORE, *worker.ADAPTERS):
            yield _family(
                metric, [((*row, *more), value) for row, load in rows for more, value in samples(metric, load)]
            )
        yield _family(worker.RESIDENT_ADAPTERS, [sample for row in rows for sample in _residents(row)])
        yield _family(worker.TIER_OK, [sample for row in rows for sample in _tiers_ok(row)])


def _family(metric: Declared, values: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    family = kind(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def _residents(row: Row) -> list[tuple[tuple[str, ...], float]]:
    labels, load = row
    if not load.num_adapter_slots:
        return []
    return [((*labels, "device"), len(load.device_adapters)), ((*labels, "host"), len(load.host_adapters))]


def _tiers_ok(row: Row) -> list[tuple[tuple[str, ...], float]]:
    labels, load = row
    return [
        ((*labels, tier), float(is_up and tier not in load.tier_problems)) for tier, is_up in load.tier_is_up.items()
    ]
