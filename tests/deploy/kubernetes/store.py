"""The objects of the fake Kubernetes API: versions, validation, patches, history. Knows nothing of HTTP."""

from __future__ import annotations

import copy
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")


class StatusError(Exception):
    """An answer of the API that is no object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason

    def body(self) -> Json:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": self.code,
            "reason": self.reason,
            "message": str(self),
        }


def invalid(message: str) -> StatusError:
    return StatusError(422, "Invalid", message)


@dataclass(frozen=True)
class Kind:
    """A resource that the server knows."""

    group: str
    version: str
    plural: str
    kind: str
    is_namespaced: bool = True
    is_custom: bool = False
    check: Callable[[Json, bool], None] = lambda item, is_new: None

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full_name(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


def _micro_times(item: Json, *values: object) -> None:
    for value in values:
        if value is not None and not _MICRO_TIME.fullmatch(str(value)):
            raise StatusError(400, "BadRequest", f"{item['kind']}: parsing time {value!r}")


def check_lease(item: Json, is_new: bool) -> None:
    spec = item.get("spec") or {}
    _micro_times(item, spec.get("acquireTime"), spec.get("renewTime"))
    if spec.get("leaseDurationSeconds", 1) <= 0 or (spec.get("leaseTransitions") or 0) < 0:
        raise invalid("spec: must be greater than 0")


def check_event(item: Json, is_new: bool) -> None:
    """As ValidateEventCreate for events.k8s.io/v1."""
    series = item.get("series")
    _micro_times(item, item.get("eventTime"), series and series.get("lastObservedTime"))
    for key in ("eventTime", "reportingController", "reportingInstance", "action", "reason"):
        if not item.get(key):
            raise invalid(f"{key}: Required value")
    if item.get("type") not in ("Normal", "Warning"):
        raise invalid("type: Unsupported value")
    if len(item.get("note", "").encode()) > 1024:
        raise invalid("note: can have at most 1024 bytes")
    if series is not None and series.get("count", 0) < 2:
        raise invalid("series.count: should be at least 2")


KINDS = (
    Kind("coordination.k8s.io", "v1", "leases", "Lease", check=check_lease),
    Kind("events.k8s.io", "v1", "events", "Event", check=check_event),
    Kind("", "v1", "pods", "Pod"),
    Kind("", "v1", "nodes", "Node", is_namespaced=False),
    Kind("", "v1", "configmaps", "ConfigMap"),
    Kind("apps", "v1", "deployments", "Deployment"),
    Kind("ray.io", "v1", "rayservices", "RayService", is_custom=True),
    Kind("ray.io", "v1", "rayclusters", "RayCluster", is_custom=True),
)


class Store:
    """Objects by kind, namespace and name. One version counts for all, as in etcd."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._objects: dict[tuple[Kind, str, str], Json] = {}
        self._version = 100
        self._history: list[tuple[int, str, Kind, Json]] = []
        self._compacted = 0

    @property
    def version(self) -> int:
        return self._version

    def get(self, kind: Kind, namespace: str, name: str) -> Json:
        with self.changed:
            try:
                return copy.deepcopy(self._objects[kind, namespace, name])
            except KeyError:
                raise StatusError(404, "NotFound", f'{kind.full_name} "{name}" not found') from None

    def list(self, kind: Kind, namespace: str) -> list[Json]:
        with self.changed:
            found = [item for (a, b, _), item in self._objects.items() if a == kind and namespace in ("", b)]
            return copy.deepcopy(sorted(found, key=lambda item: str(item["metadata"]["name"])))

    def create(self, kind: Kind, namespace: str, item: Json) -> Json:
        item = self._checked(kind, namespace, item)
        name = item["metadata"].get("name", "")
        if not _NAME.fullmatch(name):
            raise invalid(f'{kind.kind} "{name}" is invalid: metadata.name: Invalid value')
        if item["metadata"].get("resourceVersion"):
            raise StatusError(500, "", "resourceVersion should not be set on objects to be created")
        kind.check(item, True)
        with self.changed:
            if (kind, namespace, name) in self._objects:
                raise StatusError(409, "AlreadyExists", f'{kind.full_name} "{name}" already exists')
            item["metadata"]["uid"] = str(uuid.uuid4())
            return self._keep(kind, namespace, name, item, "ADDED")

    def replace(self, kind: Kind, namespace: str, name: str, item: Json) -> Json:
        item = self._checked(kind, namespace, item)
        if item["metadata"].get("name") != name:
            raise StatusError(400, "BadRequest", f"the name of the object does not match the name on the URL ({name})")
        kind.check(item, False)
        with self.changed:
            before = self.get(kind, namespace, name)
            read = item["metadata"].get("resourceVersion")
            if not read:
                raise invalid("metadata.resourceVersion: Invalid value: must be specified for an update")
            if read != before["metadata"]["resourceVersion"]:
                raise StatusError(409, "Conflict", f'Operation cannot be fulfilled on {kind.full_name} "{name}"')
            return self._update(kind, namespace, name, item, before)

    def patch(self, kind: Kind, namespace: str, name: str, content_type: str, body: Any) -> Json:
        with self.changed:
            before = self.get(kind, namespace, name)
            if content_type == "application/json-patch+json":
                if not isinstance(body, list):
                    raise StatusError(400, "BadRequest", "json: cannot unmarshal object into a JSON patch")
                item = _json_patch(before, body)
            else:
                if not isinstance(body, dict):
                    raise invalid("json: cannot unmarshal array into an object")
                item = _merge(before, body)
            if item["metadata"]["resourceVersion"] != before["metadata"]["resourceVersion"]:
                raise StatusError(409, "Conflict", f'Operation cannot be fulfilled on {kind.full_name} "{name}"')
            kind.check(item, False)
            return self._update(kind, namespace, name, item, before)

    def delete(self, kind: Kind, namespace: str, name: str) -> Json:
        with self.changed:
            item = self.get(kind, namespace, name)
            del self._objects[kind, namespace, name]
            self._note("DELETED", kind, item)
            return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def compact(self) -> None:
        """Forgets the history: watches and lists of older versions get 410."""
        with self.changed:
            self._compacted = self._version
            self._history = [entry for entry in self._history if entry[0] >= self._compacted]
            self.changed.notify_all()

    def is_gone(self, version: int) -> bool:
        return version + 1 < self._compacted

    def events_since(self, kind: Kind, namespace: str, version: int) -> Iterator[tuple[str, Json]]:
        with self.changed:
            for number, what, of, item in list(self._history):
                if number > version and of == kind and namespace in ("", item["metadata"].get("namespace")):
                    yield what, copy.deepcopy(item)

    def _checked(self, kind: Kind, namespace: str, item: Any) -> Json:
        if not isinstance(item, dict) or item.get("kind") != kind.kind or item.get("apiVersion") != kind.api_version:
            raise StatusError(400, "BadRequest", f"the object is no {kind.api_version} {kind.kind}")
        item = copy.deepcopy(item)
        item.setdefault("metadata", {})
        if kind.is_namespaced and item["metadata"].setdefault("namespace", namespace) != namespace:
            raise StatusError(400, "BadRequest", "the namespace of the provided object does not match the request")
        return item

    def _update(self, kind: Kind, namespace: str, name: str, item: Json, before: Json) -> Json:
        item["metadata"]["uid"] = before["metadata"]["uid"]
        return before if item == before else self._keep(kind, namespace, name, item, "MODIFIED")

    def _keep(self, kind: Kind, namespace: str, name: str, item: Json, what: str) -> Json:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        self._objects[kind, namespace, name] = item
        self._history.append((self._version, what, kind, item))
        self.changed.notify_all()
        return copy.deepcopy(item)

    def _note(self, what: str, kind: Kind, item: Json) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        self._history.append((self._version, what, kind, item))
        self.changed.notify_all()


def _merge(target: Json, patch: Json) -> Json:
    made = dict(target)
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        elif isinstance(value, dict):
            made[key] = _merge(made.get(key) if isinstance(made.get(key), dict) else {}, value)  # type: ignore[arg-type]
        else:
            made[key] = value
    return made


def _json_patch(target: Json, operations: list[Json]) -> Json:
    made: Json = copy.deepcopy(target)
    for operation in operations:
        *parents, last = operation["path"].strip("/").replace("~1", "/").split("/")
        place: Any = made
        try:
            for part in parents:
                place = place[int(part)] if isinstance(place, list) else place[part]
            key: Any = int(last) if isinstance(place, list) else last
            if operation["op"] == "test":
                if place[key] != operation["value"]:
                    raise invalid(f"testing path {operation['path']} failed: {json.dumps(place[key])}")
            elif operation["op"] == "remove":
                del place[key]
            elif operation["op"] in ("add", "replace"):
                if operation["op"] == "replace":
                    place[key]
                place[key] = operation["value"]
            else:
                raise StatusError(400, "BadRequest", f"unexpected operation {operation['op']}")
        except (KeyError, IndexError, TypeError, ValueError):
            raise invalid(f"{operation['op']} operation does not apply: path {operation['path']}") from None
    return made
