"""The pools as Ray Serve applications: deploys them, waits until their workers serve, takes them away again.

One pool is one application with one deployment, shown by its name on the dashboard's Serve page. Serve's own proxies
are off: it places, watches and restarts workers. Knows nothing of routers or KV.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from deploy.actors.kv_nodes import KVNodeSettings
from deploy.actors.replica import WorkerReplica
from deploy.errors import StartError, one_line
from deploy.plan import REPLICA_CPUS, PoolPlan

_LOOK_S = 0.1
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
_PERMANENT = ("workers.errors.ModelError", "deploy.errors.StartError")  # trying again would not help


def check_capacity(pools: Sequence[PoolPlan]) -> str:
    """What the Ray cluster lacks for all pools, in one line; "" when it has enough."""
    has = ray.cluster_resources()
    needs: dict[str, float] = {}
    for pool in pools:
        for bundle in pool.bundles:
            for resource, amount in bundle.items():
                needs[resource] = needs.get(resource, 0.0) + amount * pool.replicas
    short = [f"{needs[r]:g} {r}, the Ray cluster has {has.get(r, 0.0):g}" for r in needs if needs[r] > has.get(r, 0.0)]
    return f"the pools need {'; '.join(short)}" if short else ""


def open_serve() -> bool:
    """Start Serve unless it runs; says whether we did."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # importing serve has set it to INFO
    try:
        ray.get_actor(_CONTROLLER, namespace="serve")
        return False
    except ValueError:
        serve.start(proxy_location="Disabled")
        return True


def deploy_pools(pools: Sequence[PoolPlan], kv_nodes: KVNodeSettings) -> None:
    """Ask Serve for the pools; does not wait. Raises StartError when one of their names is taken."""
    taken = set(serve.status().applications) & {pool.name for pool in pools}
    if taken:
        raise StartError(f"this Ray cluster already has a Serve application {', '.join(sorted(taken))}")
    targets = [
        serve.RunTarget(_deployment(pool).bind(pool, kv_nodes), name=pool.name, route_prefix=None) for pool in pools
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _deployment(pool: PoolPlan) -> serve.Deployment:
    return serve.deployment(
        WorkerReplica,
        name=pool.name,
        num_replicas=pool.replicas,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=[dict(bundle) for bundle in pool.bundles],
        placement_group_strategy="PACK",
        health_check_period_s=0.5,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=pool.drain_timeout_s + 5.0,
        graceful_shutdown_wait_loop_s=0.1,
    )


def wait_running(names: Sequence[str], timeout_s: float, warn: Callable[[str], None]) -> None:
    """Return when all workers of the pools serve. Raises StartError with the cause when one cannot."""
    deadline_s = time.monotonic() + timeout_s
    warned: set[str] = set()
    while True:
        applications = serve.status().applications
        waiting = [name for name in names if applications[name].status != ApplicationStatus.RUNNING]
        if not waiting:
            return
        for name in waiting:
            said = _said(applications[name])
            failed = applications[name].status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
            if failed or any(error in said for error in _PERMANENT):
                raise StartError(f"pool {name}: {cause(said)}")
            if "to be scheduled" in said and name not in warned:
                warned.add(name)
                warn(f"pool {name}: waiting for the Ray cluster to have room for its workers")
        if time.monotonic() > deadline_s:
            raise StartError(f"pool {waiting[0]}: not ready after {timeout_s:.0f} s")
        time.sleep(_LOOK_S)


def _said(application: ApplicationStatusOverview) -> str:
    return "\n".join([application.message, *[d.message for d in application.deployments.values()]])


def cause(said: str) -> str:
    """The line of a traceback that names the error, without its class's path."""
    lines = [line.strip() for line in said.splitlines()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failure)\b.*: ", line)]
    permanent = [line for line in named if line.startswith(_PERMANENT)]
    line = (permanent or named or [one_line(said)])[-1]
    return re.sub(r"^(workers|deploy)\.errors\.\w+: ", "", line)


def close_serve(names: Sequence[str], was_started: bool) -> None:
    """Take the pools away, and Serve too when it was ours."""
    running = serve.status().applications
    for name in names:
        if name in running:
            serve.delete(name)
    if was_started:
        serve.shutdown()
