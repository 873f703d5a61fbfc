"""What the cluster says of the release's pods and, where that is allowed, of its nodes.

Explains why a plan is not reached. Changes nothing, and needs no more than the right to list pods.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from deploy.kubernetes.client import NODES, PODS, ApiRefused, Json, KubernetesApi, KubernetesError

_NAME = "switchyard"
_NAME_LABEL = "app.kubernetes.io/name"
_RELEASE_LABEL = "app.kubernetes.io/instance"
_COMPONENT_LABEL = "app.kubernetes.io/component"
_POOL_LABEL = "switchyard/pool"
_ZONE_LABEL = "topology.kubernetes.io/zone"
_PRODUCT_LABEL = "nvidia.com/gpu.product"
_STARTING = ("ContainerCreating", "PodInitializing")
_ASK_NODES_AGAIN_S = 600.0
_FORBIDDEN = 403


@dataclass(frozen=True, slots=True)
class PodFact:
    """One pod."""

    name: str
    component: str
    pool: str
    """Empty where it is not of a pool."""
    phase: str
    node_name: str
    """Empty until it is scheduled."""
    is_ready: bool
    is_ending: bool
    reason: str
    """Why it waits or failed, such as "Unschedulable: 0/3 nodes are available"; empty if it does neither."""
    num_restarts: int
    num_oom_killed: int
    """Containers whose last end was for lack of memory."""


@dataclass(frozen=True, slots=True)
class NodeFact:
    """One node."""

    name: str
    num_gpus: int
    """That pods may use, whether or not pods use them."""
    product: str
    """Of the GPUs; empty where it is not labelled."""
    zone: str
    is_ready: bool
    is_schedulable: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one moment."""

    pods: tuple[PodFact, ...]
    nodes: tuple[NodeFact, ...] | None
    """None where they cannot be read, which is usual: nodes are not of a namespace, so no Role allows it."""
    nodes_problem: str = ""

    def of_pool(self, pool: str) -> tuple[PodFact, ...]:
        return tuple(pod for pod in self.pods if pod.pool == pool)

    @property
    def num_oom_killed(self) -> int:
        return sum(pod.num_oom_killed for pod in self.pods)

    def explain(self, pool: str, num_wanted: int = 0) -> str:
        """Why not all pods of a pool run, or fewer than are wanted, in one line; empty if nothing is wrong."""
        made = [pod for pod in self.of_pool(pool) if not pod.is_ending]
        if not made:
            return f"no pod of {pool} has been made: see the RayCluster and the Ray operator"
        lacking = [pod for pod in made if not pod.is_ready]
        said = [f"{len(made)} of {num_wanted} pods of {pool} have been made"] if len(made) < num_wanted else []
        said += [f"{len(lacking)} of {len(made)} pods of {pool} are not ready"] if lacking else []
        reasons = Counter(pod.reason or f"{pod.phase}, starting" for pod in lacking)
        said += [f"{count} x {reason}" if count > 1 else reason for reason, count in reasons.most_common(3)]
        killed = sum(pod.num_oom_killed for pod in made)
        if killed:
            said.append(f"{killed} containers were ended for lack of memory")
        return "; ".join(said)


class ClusterFacts:
    """Reads the facts of one release."""

    def __init__(
        self,
        api: KubernetesApi,
        namespace: str,
        release: str,
        gpu_resource: str = "nvidia.com/gpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._selector = f"{_NAME_LABEL}={_NAME},{_RELEASE_LABEL}={release}"
        self._gpu_resource = gpu_resource
        self._clock = clock
        self._ask_nodes_at_s = float("-inf")
        self._nodes_problem = ""
        self.problem = ""
        """Why the last read failed."""

    def read(self) -> Facts | None:
        """None, with the reason in `problem`, if the pods could not be read. Never raises for the API."""
        try:
            listed = self._api.list(PODS, self._namespace, labelSelector=self._selector)
            pods = tuple(_pod(item) for item in listed)
        except KubernetesError as error:
            self.problem = str(error)
            return None
        self.problem = ""
        return Facts(pods, self._nodes(), self._nodes_problem)

    def _nodes(self) -> tuple[NodeFact, ...] | None:
        if self._clock() < self._ask_nodes_at_s:
            return None
        try:
            nodes = tuple(_node(item, self._gpu_resource) for item in self._api.list(NODES, None))
        except KubernetesError as error:
            self._nodes_problem = str(error)
            if isinstance(error, ApiRefused) and error.status == _FORBIDDEN:
                # Not asked each time: refusals fill the audit log of the cluster.
                self._ask_nodes_at_s = self._clock() + _ASK_NODES_AGAIN_S
            return None
        self._nodes_problem = ""
        return nodes


def release_of_pod(api: KubernetesApi, namespace: str, pod_name: str) -> str:
    """The release that a pod belongs to, by its label; empty if there is no such pod. Raises KubernetesError."""
    # Listed rather than got: the right to list is needed anyway.
    for item in api.list(PODS, namespace, fieldSelector=f"metadata.name={pod_name}"):
        return str((item["metadata"].get("labels") or {}).get(_RELEASE_LABEL, ""))
    return ""


def _pod(item: Json) -> PodFact:
    metadata, spec, status = item["metadata"], item.get("spec") or {}, item.get("status") or {}
    labels = metadata.get("labels") or {}
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    return PodFact(
        name=metadata["name"],
        component=labels.get(_COMPONENT_LABEL, ""),
        pool=labels.get(_POOL_LABEL, ""),
        phase=status.get("phase") or "Unknown",
        node_name=spec.get("nodeName") or "",
        is_ready=_condition(status, "Ready").get("status") == "True",
        is_ending="deletionTimestamp" in metadata,
        reason=_reason(status, containers),
        num_restarts=sum(container.get("restartCount") or 0 for container in containers),
        num_oom_killed=sum(_was_oom_killed(container) for container in containers),
    )


def _reason(status: Json, containers: list[Json]) -> str:
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return _said(scheduled)
    waiting = [(container.get("state") or {}).get("waiting") for container in containers]
    wrong = [state for state in waiting if state and state.get("reason") not in _STARTING]
    if wrong:
        return _said(wrong[0])
    if status.get("reason"):  # such as Evicted
        return _said(status)
    ended = [(container.get("state") or {}).get("terminated") for container in containers]
    failed = [state for state in ended if state and state.get("exitCode")]
    return _said(failed[0]) if failed else ""


def _said(state: Json) -> str:
    reason, message = str(state.get("reason") or "no reason given"), " ".join(str(state.get("message") or "").split())
    return f"{reason}: {message[:300]}" if message else reason


def _was_oom_killed(container: Json) -> bool:
    ends = [(container.get(key) or {}).get("terminated") or {} for key in ("state", "lastState")]
    return any(end.get("reason") == "OOMKilled" for end in ends)


def _condition(status: Json, kind: str) -> Json:
    return next((found for found in status.get("conditions") or () if found["type"] == kind), {})


def _node(item: Json, gpu_resource: str) -> NodeFact:
    metadata, status = item["metadata"], item.get("status") or {}
    labels = metadata.get("labels") or {}
    return NodeFact(
        name=metadata["name"],
        num_gpus=int((status.get("allocatable") or {}).get(gpu_resource, 0)),
        product=labels.get(_PRODUCT_LABEL, ""),
        zone=labels.get(_ZONE_LABEL, ""),
        is_ready=_condition(status, "Ready").get("status") == "True",
        is_schedulable=not (item.get("spec") or {}).get("unschedulable", False),
    )
