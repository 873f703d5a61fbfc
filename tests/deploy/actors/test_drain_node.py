"""A Ray node is drained as a pod's end would: its worker ends its stream, and another starts elsewhere."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.config import ROOT, child_environment, prepare_ray_environment
from tests.processes import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
_ON_NODE = """
import sys
from unittest import mock
root, address, node_id = sys.argv[1:]
sys.path.insert(0, root)
import ray
from deploy.actors import drain_node

# Both nodes have this machine's address: say which one we are on.
with mock.patch.object(ray.runtime_context.RuntimeContext, "get_node_id", lambda self: node_id):
    sys.exit(0 if drain_node.drain(address, 60, print) else 1)
"""


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A head without CPUs and two workers' nodes, with Serve."""
    prepare_ray_environment()
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for name in ("one", "two"):
            cluster.add_node(num_cpus=1, resources={name: 1})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_workers_of_a_drained_node_end_their_streams_and_start_elsewhere(two_nodes: Any, tmp_path: Path) -> None:
    import ray
    from ray import serve

    log = tmp_path / "log"

    @serve.deployment(
        num_replicas=1,
        placement_group_bundles=[{"CPU": 1}],
        graceful_shutdown_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.1,
    )
    class Worker:
        def __init__(self) -> None:
            self.node_id = ray.get_runtime_context().get_node_id()
            with log.open("a") as file:
                file.write(f"start {self.node_id}\n")

        async def __del__(self) -> None:
            import asyncio

            await asyncio.sleep(3)  # a stream that ends
            with log.open("a") as file:
                file.write(f"end {self.node_id}\n")

    serve.run(Worker.bind(), route_prefix=None)
    (first,) = [line.split()[1] for line in log.read_text().splitlines()]
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _ON_NODE, str(ROOT), two_nodes.address, first],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began_s > 3
    lines = log.read_text().splitlines()
    assert f"end {first}" in lines
    deadline_s = time.monotonic() + 60
    while not any(line.startswith("start") and first not in line for line in log.read_text().splitlines()):
        assert time.monotonic() < deadline_s, "no other worker"
        time.sleep(0.2)
