"""`switchyard autoscaler`: sizes the pools of a cluster whose parts are started apart, as on Kubernetes."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import click

from deploy.autoscaling.problems import Problems
from deploy.commands.options import cluster_options
from deploy.errors import ConfigError, StartError

_STUCK_S = 60.0
_AWAY_S = 1.0  # between two tries to find Redis


@click.command()
@cluster_options()
@click.option("--ray-dashboard", required=True, metavar="URL", help="Of Ray, whose Serve runs the pools.")
@click.option("--lease", metavar="NAME", help="Kubernetes Lease of the autoscaler that acts. Default: a lock in Redis.")
@click.option("--ray-service", metavar="NAME", help="RayService that Events are about; with --lease.")
@click.option("--record", metavar="FILE", help="Append each decision to a file, for `switchyard scale --replay`.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of /metrics and /healthz.")
@click.option("--port", type=click.IntRange(0, 65535), default=9300, show_default=True, help="Their port.")
def autoscaler(
    config_path: str,
    assignments: tuple[str, ...],
    ray_dashboard: str,
    lease: str | None,
    ray_service: str | None,
    record: str | None,
    host: str,
    port: int,
) -> int:
    """Watch the pools, decide how many workers each needs, and say so or see to it (autoscaling.mode)."""
    from deploy.autoscaling.autoscaler import Autoscaler, EventSink, Lock
    from deploy.autoscaling.memory import Memory
    from deploy.autoscaling.metrics import AutoscalerMetrics, HttpPort
    from deploy.autoscaling.serve_api import ServeApi
    from deploy.autoscaling.workers import WorkerWatch
    from deploy.config import load, own_pod
    from deploy.standalone import check_standalone
    from kvstore.connect import open_directory
    from planner.scaling.record import DecisionLog

    if not ray_dashboard.startswith(("http://", "https://")):
        raise ConfigError(f"--ray-dashboard: must be an http:// URL, not {ray_dashboard!r}")
    if (lease is None) != (ray_service is None):
        raise ConfigError("--lease and --ray-service: one needs the other")
    config = load(config_path, assignments)
    check_standalone(config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    problems = Problems()
    has_memory = _finds_control(config.kvstore.control_url, config.name, problems)
    memory = Memory(config.kvstore.control_url, config.name)
    lock: Lock = memory
    events: EventSink | None = None
    if lease is not None and ray_service is not None:
        from deploy.autoscaling.on_kubernetes import open_kubernetes

        lock, events = open_kubernetes(lease, ray_service, own_pod())
    try:
        log = DecisionLog(Path(record)) if record else None
    except OSError as error:
        raise ConfigError(f"--record: {record}: {error.strerror}") from None
    watch = WorkerWatch(open_directory(config.kvstore.control_url, config.name))
    metrics = AutoscalerMetrics()
    serve = ServeApi(ray_dashboard, tuple(config.pools))
    acting = Autoscaler(config, serve, watch, memory, lock, metrics, events, log)
    ticked_s = [time.monotonic()]
    try:
        http = HttpPort(host, port, metrics.registry, lambda: time.monotonic() - ticked_s[0] < _STUCK_S)
    except OSError as error:
        raise ConfigError(f"--port: {host}:{port}: {error.strerror}") from None
    stop = _Stop(serve.close)
    click.echo(f"autoscaler of {config.name}: mode {config.autoscaling.mode}, metrics on port {http.port}")
    try:
        while not stop.was_asked:
            has_memory = has_memory or _finds_control(config.kvstore.control_url, config.name, problems)
            wait_s = acting.tick() if has_memory and not stop.was_asked else _AWAY_S
            ticked_s[0] = time.monotonic()
            stop.wait(wait_s)
    finally:
        acting.stop()
        http.close()
        watch.close()
        memory.close()
    return 0


def _finds_control(url: str, cluster: str, problems: Problems) -> bool:
    """Whether the Redis does what it will be asked for; a warning while it is away. Raises ConfigError where that would
    never happen."""
    from deploy.preflight import check_control

    try:
        check_control(url, cluster)
    except StartError as error:
        problems.note("waits for Redis", str(error))
        return False
    problems.over("waits for Redis")
    return True


class _Stop:
    """SIGTERM and SIGINT. A SimpleQueue, unlike an Event, may be put to by a signal's handler."""

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self.was_asked = False
        self._on_signal = on_signal
        self._asked: queue.SimpleQueue[None] = queue.SimpleQueue()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.was_asked = True
        self._asked.put(None)
        self._on_signal()

    def wait(self, seconds: float) -> None:
        """Until then, or until a signal."""
        with contextlib.suppress(queue.Empty):
            self._asked.get(timeout=seconds)
