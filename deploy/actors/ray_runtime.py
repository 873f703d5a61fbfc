"""The Ray cluster below everything: starts one on this machine or joins a running one, and lets go of it again.

Knows nothing of pools, models or Serve.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.config import RayConfig, prepare_ray_environment, temporary_files_in
from deploy.errors import StartError, one_line
from deploy.host import free_port
from kvstore.network.addresses import join_host_port

_FIRST_DASHBOARD_PORT = 8265
_FIRST_METRICS_PORT = 9101
_ATTEMPTS = 3
_TEMPORARY = "tmp"  # a short name: Python's servers of processes make sockets in folders of 14 characters below it


@dataclass(frozen=True, slots=True)
class RayRuntime:
    """A Ray cluster that this process is connected to."""

    address: str
    """HOST:PORT that others join by."""
    node_id: str
    """This machine's node."""
    node_ip: str
    """Its address."""
    dashboard: str
    """URL of the dashboard; "" when there is none."""
    metrics: str
    """URL of this node's metrics."""
    num_gpus: float
    """GPUs of the whole cluster."""
    was_started: bool
    """Whether we started it, and so stop it."""


def open_ray(config: RayConfig, num_cpus: int, temp_dir: Path, reserved: Collection[int] = ()) -> RayRuntime:
    """Join the cluster that the config names, or start one here. Raises StartError.

    reserved: ports that Ray is not to take. Call it in a folder without modules: Ray adds the current one to its
    workers' import path.
    """
    prepare_ray_environment()
    import ray

    if config.address:
        try:
            ray.init(address=config.address, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:
            raise StartError(f"cannot join the Ray cluster at {config.address}: {one_line(error)}") from error
    else:
        # Ray kills its dashboard, whose temporary files would stay in the machine's folder for them.
        temporary = temp_dir / _TEMPORARY
        temporary.mkdir(parents=True, exist_ok=True)
        with temporary_files_in(temporary):
            _start_here(lambda: _local_options(config, num_cpus, temp_dir, reserved))
    return _describe(config)


def _start_here(make_options: Callable[[], dict[str, Any]]) -> None:
    """Start Ray. Its node gives up when one of its processes takes 15 s to start, as on a busy machine, or when a port
    that was free is taken meanwhile, as by another cluster that starts: try again, with ports that are free then."""
    import ray

    for attempt in range(1, _ATTEMPTS + 1):
        before = _children()
        try:
            ray.init(**make_options())
            return
        except BaseException as error:
            for pid in _children() - before:  # what it had started already
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not isinstance(error, Exception):  # interrupted
                raise
            if attempt == _ATTEMPTS:
                raise StartError(f"Ray did not start: {one_line(error)}") from error


def _children() -> set[int]:
    """Processes that this one has started."""
    lists = Path("/proc/self/task").glob("*/children")
    return {int(pid) for each in lists for pid in each.read_text().split()}


def _local_options(config: RayConfig, num_cpus: int, temp_dir: Path, reserved: Collection[int]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "address": "local",
        "num_cpus": config.num_cpus or max(num_cpus, os.cpu_count() or 1),
        "object_store_memory": config.object_store_bytes,
        "include_dashboard": config.dashboard,
        "dashboard_host": config.dashboard_host,
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "_temp_dir": str(temp_dir),
        "_metrics_export_port": config.metrics_export_port or free_port("0.0.0.0", _FIRST_METRICS_PORT, reserved),
    }
    if config.dashboard:
        first_free = free_port(config.dashboard_host, _FIRST_DASHBOARD_PORT, reserved)
        options["dashboard_port"] = config.dashboard_port or first_free
    if config.node_ip:
        options["_node_ip_address"] = config.node_ip
    return options


def _describe(config: RayConfig) -> RayRuntime:
    import ray

    context = ray.get_runtime_context()
    node_id = context.get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    dashboard = ray._private.worker.get_dashboard_url() if config.dashboard or config.address else ""
    metrics = join_host_port(node["NodeManagerAddress"], node["MetricsExportPort"])
    return RayRuntime(
        address=context.gcs_address,
        node_id=node_id,
        node_ip=node["NodeManagerAddress"],
        dashboard=f"http://{dashboard}" if dashboard else "",
        metrics=f"http://{metrics}/metrics",
        num_gpus=float(ray.cluster_resources().get("GPU", 0)),
        was_started=not config.address,
    )


def close_ray() -> None:
    """Leave the cluster; one that was started here ends."""
    import ray

    ray.shutdown()
