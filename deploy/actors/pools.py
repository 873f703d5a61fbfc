"""The pools as Ray Serve applications: deploys them, waits until their workers serve, takes them away again.

One pool is one application with one deployment, shown by its name on the dashboard's Serve page. Serve's own proxies
are off: it places, watches and restarts workers. Knows nothing of routers or KV.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from deploy.actors.kv_nodes import KVNodeSettings
from deploy.actors.replica import WorkerReplica
from deploy.actors.start_failure import find_failure
from deploy.errors import StartError, one_line
from deploy.plan import REPLICA_CPUS, PoolPlan

_LOOK_S = 0.1
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
_CAPACITY_S = 30.0  # after so long without resources for a worker the user is warned


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
        serve.RunTarget(
            pool_application(pool, kv_nodes), name=pool.name, route_prefix=None, external_scaler_enabled=True
        )
        for pool in pools
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def pool_application(pool: PoolPlan, kv_nodes: KVNodeSettings) -> serve.Application:
    """A pool as Serve knows it."""
    deployment = serve.deployment(
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
    return deployment.bind(pool, kv_nodes)


def wait_running(pools: Sequence[PoolPlan], timeout_s: float, warn: Callable[[str], None]) -> None:
    """Return when all workers of the pools serve. Raises StartError with the cause when one cannot."""
    began_s = time.monotonic()
    warned: set[str] = set()
    while True:
        applications = serve.status().applications
        waiting = [pool for pool in pools if applications[pool.name].status != ApplicationStatus.RUNNING]
        if not waiting:
            return
        for pool in waiting:
            problem = _problem(applications[pool.name])
            if problem:
                raise StartError(f"pool {pool.name}: {problem}")
        waited_s = time.monotonic() - began_s
        if waited_s > timeout_s:
            raise StartError(f"pool {waiting[0].name}: not ready after {timeout_s:.0f} s")
        unwarned = [pool for pool in waiting if pool.name not in warned]
        for pool in _without_room(unwarned) if waited_s > _CAPACITY_S else ():
            warned.add(pool.name)
            warn(f"pool {pool.name}: waiting for the Ray cluster to have resources for its workers")
        time.sleep(_LOOK_S)


def _problem(application: ApplicationStatusOverview) -> str:
    """Why a pool will not come up, in one line; "" while it may. Serve tries again what is not permanent."""
    said = "\n".join([application.message, *[d.message for d in application.deployments.values()]])
    failure = find_failure(said)
    if failure is not None and failure.is_permanent:
        return failure.problem
    if application.status not in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
        return ""
    return one_line(said) if failure is None else failure.problem


def _without_room(pools: Sequence[PoolPlan]) -> list[PoolPlan]:
    """Pools of which a worker's placement group waits for resources."""
    groups = ray.util.placement_group_table().values() if pools else ()
    pending = [list(group["bundles"].values()) for group in groups if group["state"] == "PENDING"]
    return [pool for pool in pools if [dict(bundle) for bundle in pool.bundles] in pending]


def close_serve(names: Sequence[str], was_started: bool) -> None:
    """Take the pools away, and Serve too when it was ours."""
    running = serve.status().applications
    for name in names:
        if name in running:
            serve.delete(name)
    if was_started:
        serve.shutdown()
