"""Requests whose answers the fake Kubernetes API must give as a real one does: each with its status and reason.

Recorded from kube-apiserver 1.20.2. `VERSION` in a body stands for the version of the object as it was last answered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import urllib3

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
NAMESPACE = "contract"
VERSION = "VERSION"

_LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
_EVENTS = f"/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events"
_CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_RAY = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices"
_NOW = "2026-01-02T03:04:05.000000Z"

LIMITED_RULES: Sequence[dict[str, Any]] = (
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "resourceNames": ["a"], "verbs": ["get", "update"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
)
"""Of the limited user."""


@dataclass(frozen=True)
class Step:
    """A request and its answer."""

    what: str
    method: str
    path: str
    status: int
    reason: str = ""
    body: Any = None
    content_type: str = "application/json"
    token: str = "admin"
    """admin, limited, unknown or empty."""


def lease(name: str, version: str = "", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, **({"resourceVersion": version} if version else {})}
    full = {"holderIdentity": "x", "leaseDurationSeconds": 15, "renewTime": _NOW, **spec}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": full}


def event(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "eventTime": _NOW,
        "reportingController": "switchyard-autoscaler",
        "reportingInstance": "pod",
        "regarding": {"apiVersion": "v1", "kind": "Pod", "name": "p", "namespace": NAMESPACE},
        "reason": "Reason",
        "action": "Action",
        "note": "note",
        "type": "Normal",
        **fields,
    }


def config_map(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"own": name}}, "data": data}


def ray_service(name: str) -> dict[str, Any]:
    head = {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "head", "image": "ray:1"}]}}}
    spec = {"rayClusterConfig": {"headGroupSpec": head}}
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": name}, "spec": spec}


STEPS = (
    Step("a token that nobody has", "GET", f"{_LEASES}/a", 401, "Unauthorized", token="unknown"),
    Step("no token", "GET", f"{_LEASES}/a", 403, "Forbidden", token=""),
    Step("an unknown resource", "GET", f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/loans", 404, "NotFound"),
    Step("an unknown group", "GET", f"/apis/none.example/v1/namespaces/{NAMESPACE}/leases", 404),
    Step("what is not there", "GET", f"{_LEASES}/a", 404, "NotFound"),
    Step("not there, by the limited", "GET", f"{_LEASES}/a", 404, "NotFound", token="limited"),
    Step("another name, by the limited", "GET", f"{_LEASES}/b", 403, "Forbidden", token="limited"),
    Step("created", "POST", _LEASES, 201, body=lease("a"), token="limited"),
    Step("created again", "POST", _LEASES, 409, "AlreadyExists", lease("a"), token="limited"),
    Step("create needs no name in a Role", "POST", _LEASES, 201, body=lease("b"), token="limited"),
    Step("a name in capitals", "POST", _LEASES, 422, "Invalid", lease("Upper_Case")),
    Step("a duration of zero", "POST", _LEASES, 422, "Invalid", lease("c", leaseDurationSeconds=0)),
    Step("a time without its six digits", "POST", _LEASES, 400, "BadRequest", lease("c", renewTime=_NOW[:19] + "Z")),
    Step("another kind", "POST", _LEASES, 400, "BadRequest", config_map("c")),
    Step("no JSON", "POST", _LEASES, 400, "BadRequest", "{"),
    Step("another content type", "POST", _LEASES, 415, "UnsupportedMediaType", lease("c"), "text/plain"),
    Step("create at a name", "POST", f"{_LEASES}/c", 405, "MethodNotAllowed", lease("c")),
    Step("replaced", "PUT", f"{_LEASES}/a", 200, body=lease("a", VERSION, holderIdentity="y"), token="limited"),
    Step("replaced, stale", "PUT", f"{_LEASES}/a", 409, "Conflict", lease("a", "1"), token="limited"),
    Step("replaced without a version", "PUT", f"{_LEASES}/a", 422, "Invalid", lease("a"), token="limited"),
    Step("replaced under another name", "PUT", f"{_LEASES}/a", 400, "BadRequest", lease("b", VERSION)),
    Step("released without a holder", "PUT", f"{_LEASES}/a", 200, body=lease("a", VERSION, holderIdentity=None)),
    Step("patched by who may not", "PATCH", f"{_LEASES}/a", 403, "Forbidden", {}, MERGE_PATCH, "limited"),
    Step("deleted by who may not", "DELETE", f"{_LEASES}/a", 403, "Forbidden", token="limited"),
    Step("listed by who may not", "GET", _LEASES, 403, "Forbidden", token="limited"),
    Step("listed", "GET", f"{_LEASES}?limit=1", 200),
    Step("pods, by the limited", "GET", f"{_PODS}?labelSelector=a%3Db", 200, token="limited"),
    Step("one pod, by the limited", "GET", f"{_PODS}/x", 403, "Forbidden", token="limited"),
    Step("nodes, by the limited", "GET", "/api/v1/nodes", 403, "Forbidden", token="limited"),
    Step("nodes", "GET", "/api/v1/nodes", 200),
    Step("an event", "POST", _EVENTS, 201, body=event("e1")),
    Step("a series", "POST", _EVENTS, 201, body=event("e2", series={"count": 2, "lastObservedTime": _NOW})),
    Step(
        "a series of one", "POST", _EVENTS, 422, "Invalid", event("e3", series={"count": 1, "lastObservedTime": _NOW})
    ),
    Step("a note of 1025 bytes", "POST", _EVENTS, 422, "Invalid", event("e4", note="é" * 512 + "x")),
    Step("a note of 1024 bytes", "POST", _EVENTS, 201, body=event("e5", note="é" * 512)),
    Step("no action", "POST", _EVENTS, 422, "Invalid", event("e6", action="")),
    Step("another type", "POST", _EVENTS, 422, "Invalid", event("e7", type="Error")),
    Step("about elsewhere", "POST", _EVENTS, 201, body=event("e8", regarding={"namespace": "other"})),
    Step("a map", "POST", _CONFIG_MAPS, 201, body=config_map("m", a="1")),
    Step("patched", "PATCH", f"{_CONFIG_MAPS}/m", 200, "", {"data": {"b": "2"}}, MERGE_PATCH),
    Step("patched strategically", "PATCH", f"{_CONFIG_MAPS}/m", 200, "", {"data": {"c": "3"}}, STRATEGIC_PATCH),
    Step(
        "a JSON patch",
        "PATCH",
        f"{_CONFIG_MAPS}/m",
        200,
        "",
        [{"op": "test", "path": "/data/b", "value": "2"}, {"op": "replace", "path": "/data/b", "value": "4"}],
        JSON_PATCH,
    ),
    Step(
        "a JSON patch whose test fails",
        "PATCH",
        f"{_CONFIG_MAPS}/m",
        422,
        "Invalid",
        [{"op": "test", "path": "/data/b", "value": "2"}],
        JSON_PATCH,
    ),
    Step(
        "a JSON patch of nothing",
        "PATCH",
        f"{_CONFIG_MAPS}/m",
        422,
        "Invalid",
        [{"op": "remove", "path": "/data/zzz"}],
        JSON_PATCH,
    ),
    Step(
        "a JSON patch with a stale version",
        "PATCH",
        f"{_CONFIG_MAPS}/m",
        422,
        "Invalid",
        [{"op": "test", "path": "/metadata/resourceVersion", "value": "1"}],
        JSON_PATCH,
    ),
    Step("a list as a merge patch", "PATCH", f"{_CONFIG_MAPS}/m", 422, "Invalid", [], MERGE_PATCH),
    Step("an object as a JSON patch", "PATCH", f"{_CONFIG_MAPS}/m", 400, "BadRequest", {}, JSON_PATCH),
    Step("a plain patch", "PATCH", f"{_CONFIG_MAPS}/m", 415, "UnsupportedMediaType", {}),
    Step(
        "a merge patch of a stale version",
        "PATCH",
        f"{_CONFIG_MAPS}/m",
        409,
        "Conflict",
        {"metadata": {"resourceVersion": "1"}},
        MERGE_PATCH,
    ),
    Step("a patch of nothing", "PATCH", f"{_CONFIG_MAPS}/none", 404, "NotFound", {}, MERGE_PATCH),
    Step("a custom object", "POST", _RAY, 201, body=ray_service("r")),
    Step("a custom one, strategically", "PATCH", f"{_RAY}/r", 415, "UnsupportedMediaType", {}, STRATEGIC_PATCH),
    Step("a custom one, merged", "PATCH", f"{_RAY}/r", 200, "", {"metadata": {"labels": {"a": "b"}}}, MERGE_PATCH),
    Step("deleted", "DELETE", f"{_CONFIG_MAPS}/m", 200),
    Step("deleted again", "DELETE", f"{_CONFIG_MAPS}/m", 404, "NotFound"),
)


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    reason: str


def replay(url: str, pool: urllib3.PoolManager, tokens: dict[str, str]) -> list[tuple[str, Answer]]:
    """Sends all steps to a server; `tokens` has one for admin and limited."""
    versions: dict[str, str] = {}
    answers = []
    for step in STEPS:
        name = step.path.rpartition("/")[2]
        body = step.body if isinstance(step.body, str) else json.dumps(step.body)
        headers = {"Content-Type": step.content_type, "Accept": "application/json"}
        if step.token:
            headers["Authorization"] = f"Bearer {tokens.get(step.token, 'nobodys')}"
        got = pool.request(
            step.method,
            url + step.path,
            body=None if step.body is None else body.replace(VERSION, versions.get(name, "")).encode(),
            headers=headers,
            timeout=20,
            retries=False,
        )
        try:
            answer = got.json()
        except ValueError:  # the real server says some things as text
            answer = {}
        metadata = answer.get("metadata") or {}
        if "resourceVersion" in metadata and "name" in metadata:
            versions[metadata["name"]] = metadata["resourceVersion"]
        answers.append((step.what, Answer(got.status, answer.get("reason", "") if got.status >= 400 else "")))
    return answers


def recorded() -> list[tuple[str, Answer]]:
    """What all servers are to answer."""
    return [(step.what, Answer(step.status, step.reason)) for step in STEPS]


def watched(
    url: str, pool: urllib3.PoolManager, token: str, version: str, resource: str = "configmaps", timeout_s: int = 1
) -> list[dict[str, Any]]:
    """What a watch from a version on says until its time is over, with bookmarks."""
    path = _EVENTS if resource == "events" else _CONFIG_MAPS
    query = f"watch=1&resourceVersion={version}&timeoutSeconds={timeout_s}&allowWatchBookmarks=true"
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
    got = pool.request("GET", f"{url}{path}?{query}", headers=headers, timeout=20, retries=False)
    assert got.status == 200, got.data
    return [json.loads(line) for line in got.data.splitlines() if line]


WATCHED = [("ADDED", "one")]


def outline(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Types and names, without bookmarks: a real server sends one about once a minute, the fake at once."""
    return [(event["type"], event["object"]["metadata"]["name"]) for event in events if event["type"] != "BOOKMARK"]
