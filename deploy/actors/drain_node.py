"""Drains this pod's Ray node before the pod ends: a preStop hook, `python -m deploy.actors.drain_node --timeout-s N`.

Ray gives a draining node no more work. Serve starts its workers elsewhere, and those here refuse new requests and end
their streams. Returns when none is left. Knows nothing of Kubernetes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated import autoscaler_pb2
from ray.util.state import list_actors

from deploy.config import prepare_ray_environment

_LOOK_S = 1.0
_REPLICA = "ServeReplica:"  # how Serve names the class of a replica's actor


def drain(address: str, timeout_s: float, say: Callable[[str], None]) -> bool:
    """Drain the node that we are on; whether all its workers ended in time."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        context = ray.get_runtime_context()
        node_id = context.get_node_id()
        deadline_s = time.time() + timeout_s
        accepted, problem = GcsClient(address=context.gcs_address).drain_node(
            node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),  # an idle one could be refused
            "the pod ends",
            int(deadline_s * 1000),
        )
        if not accepted:
            say(f"Ray does not drain this node: {problem}")
            return False
        while workers := _workers_on(node_id):
            if time.time() > deadline_s:
                say(f"{len(workers)} workers still ran after {timeout_s:.0f} s: {', '.join(workers)}")
                return False
            time.sleep(_LOOK_S)
        return True
    finally:
        ray.shutdown()


def _workers_on(node_id: str) -> list[str]:
    """Replicas of Serve that live on a node."""
    found = list_actors(filters=[("node_id", "=", node_id), ("state", "=", "ALIVE")], limit=1000)
    return sorted(actor.class_name for actor in found if actor.class_name.startswith(_REPLICA))


@click.command()
@click.option("--timeout-s", type=float, required=True, help="Workers that run longer are left to the signal.")
@click.option("--address", default="auto", help="Of the Ray cluster; by default the one of this node.")
def main(timeout_s: float, address: str) -> None:
    """Drain the Ray node of this pod."""
    prepare_ray_environment()
    sys.exit(0 if drain(address, timeout_s, lambda text: click.echo(text, err=True)) else 1)


if __name__ == "__main__":
    main()
