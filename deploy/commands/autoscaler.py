"""`switchyard autoscaler`: sizes the pools of a cluster whose parts are started apart, as on Kubernetes."""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path

import click

from deploy.commands.options import cluster_options
from deploy.errors import ConfigError

_STUCK_S = 60.0


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
    acting = Autoscaler(config, ServeApi(ray_dashboard, tuple(config.pools)), watch, memory, lock, metrics, events, log)
    ticked_s = [time.monotonic()]
    try:
        http = HttpPort(host, port, metrics.registry, lambda: time.monotonic() - ticked_s[0] < _STUCK_S)
    except OSError as error:
        raise ConfigError(f"--port: {host}:{port}: {error.strerror}") from None
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    click.echo(f"autoscaler of {config.name}: mode {config.autoscaling.mode}, metrics on port {http.port}")
    try:
        while not stop.is_set():
            wait_s = acting.tick()
            ticked_s[0] = time.monotonic()
            stop.wait(wait_s)
    finally:
        acting.stop()
        http.close()
        watch.close()
        memory.close()
    return 0
