"""The autoscaler's HTTP port: /metrics for Prometheus, /healthz for the kubelet."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, make_wsgi_app

from planner.scaling.actions import Progress
from planner.scaling.plan import Explanation
from telemetry import autoscaler as declared
from telemetry.metric import Metric


class AutoscalerMetrics:
    """What one autoscaler shows. Its own registry: a process may hold several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges = {metric.name: self._gauge(metric) for metric in declared.METRICS if metric.kind.value == "gauge"}
        self._decisions = self._counter(declared.DECISIONS)
        self._actions = self._counter(declared.ACTIONS)
        self._problems = self._counter(declared.PROBLEMS)

    def show_leader(self, is_leader: bool) -> None:
        """Whether it acts."""
        self._of(declared.LEADER).set(is_leader)

    def show_progress(self, progress: Progress, pools: Iterable[str]) -> None:
        """Where the workers stand."""
        gauge = self._of(declared.WORKERS)
        gauge.clear()
        for pool in pools:
            gauge.labels(pool, "ready").set(0)
        for worker in progress.workers:
            gauge.labels(worker.pool, worker.status).inc()

    def show_decision(self, explanation: Explanation) -> None:
        """What was decided."""
        self._decisions.inc()
        self._of(declared.LAST_DECISION).set(explanation.at_s)
        self._of(declared.PLAN).set(explanation.plan_id)
        self._of(declared.GPUS).set(explanation.num_gpus)
        self._of(declared.TARGET_GPUS).set(explanation.target_gpus)
        self._of(declared.MAX_GPUS).set(explanation.max_gpus)
        self._of(declared.BINDING).clear()
        for pool in explanation.pools:
            self._of(declared.TARGET_WORKERS).labels(pool.pool).set(pool.target)
            self._of(declared.MISSING_WORKERS).labels(pool.pool).set(pool.num_missing)
            self._of(declared.BINDING).labels(pool.pool, pool.binding).set(1)

    def count_action(self, kind: str) -> None:
        """One that was carried out."""
        self._actions.labels(kind).inc()

    def count_problem(self, part: str) -> None:
        """Something did not answer, or refused."""
        self._problems.labels(part).inc()

    def _of(self, metric: Metric) -> Any:
        return self._gauges[metric.name]

    def _gauge(self, metric: Metric) -> Gauge:
        return Gauge(metric.name, metric.meaning, metric.labels, registry=self.registry)

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.meaning, metric.labels, registry=self.registry)


class HttpPort:
    """Serves in a thread of its own. is_alive: whether the autoscaler's loop goes round. Raises OSError."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, is_alive: Callable[[], bool]) -> None:
        metrics = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            match environ["PATH_INFO"]:
                case "/metrics":
                    return list(metrics(environ, start_response))
                case "/healthz":
                    status, text = ("200 OK", b"ok\n") if is_alive() else ("503 Service Unavailable", b"stuck\n")
                case _:
                    status, text = "404 Not Found", b"/metrics and /healthz are here\n"
            start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
            return [text]

        self._server = make_server(host, port, app, _Server, _Handler)
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):  # how the standard library makes a server with threads
    daemon_threads = True  # a connection that says nothing must not hold up the kubelet's


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds of silence

    def handle(self) -> None:
        """As in the base class, which does not expect its own time-out."""
        with contextlib.suppress(TimeoutError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # the base class names it
        """Scrapes are not worth a line."""
