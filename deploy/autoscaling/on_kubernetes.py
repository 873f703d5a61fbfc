"""The lock and the events of an autoscaler on Kubernetes: a Lease, and Events about the RayService."""

from __future__ import annotations

import secrets
import time

from deploy.errors import StartError
from deploy.kubernetes.client import RAY_SERVICES, KubernetesApi, KubernetesError, in_cluster, own_namespace
from deploy.kubernetes.events import EventLog, ObjectReference
from deploy.kubernetes.facts import ClusterFacts, release_of_pod
from deploy.kubernetes.lease import LeaseHolder

_REPORTER = "switchyard-autoscaler"


class KubernetesLock:
    """A Lease, renewed no more often than it needs."""

    problem = ""
    """Why the last call did not hold it; empty also when another one holds it, or when the call did not try."""

    def __init__(self, holder: LeaseHolder) -> None:
        self._holder = holder
        self._tried_s = float("-inf")

    def hold(self) -> bool:
        """Whether this is the autoscaler that acts."""
        now_s = time.monotonic()
        self.problem = ""
        if now_s - self._tried_s >= self._holder.retry_s:
            self._tried_s = now_s
            self._holder.hold()
            self.problem = self._holder.problem
        return self._holder.is_held

    def release(self) -> None:
        """Let another one act at once."""
        self._holder.release()


class KubernetesEvents:
    """Events, and what pods and nodes say of workers that cannot be had."""

    def __init__(self, events: EventLog, facts: ClusterFacts | None) -> None:
        self._events = events
        self._facts = facts

    def emit(self, reason: str, note: str, action: str, is_warning: bool) -> None:
        """Emit an Event."""
        self._events.emit(reason, note, action, is_warning)
        self._events.flush()

    def why_missing(self, pool: str) -> str:
        """What the pods of a pool wait for."""
        found = self._facts.read() if self._facts is not None else None
        return found.explain(pool) if found is not None else ""


def open_kubernetes(lease: str, ray_service: str, pod_name: str) -> tuple[KubernetesLock, KubernetesEvents]:
    """Of the cluster that this pod runs in. Raises ConfigError or StartError."""
    api, namespace = in_cluster(), own_namespace()
    identity = f"{pod_name or 'autoscaler'}_{secrets.token_hex(6)}"
    holder = LeaseHolder(api, namespace, lease, identity)
    events = EventLog(api, namespace, ObjectReference(RAY_SERVICES, ray_service), _REPORTER, identity)
    return KubernetesLock(holder), KubernetesEvents(events, _facts(api, namespace, pod_name))


def _facts(api: KubernetesApi, namespace: str, pod_name: str) -> ClusterFacts | None:
    if not pod_name:
        return None
    try:
        return ClusterFacts(api, namespace, release_of_pod(api, namespace, pod_name))
    except KubernetesError as error:
        raise StartError(f"this pod cannot be read: {error}") from None
