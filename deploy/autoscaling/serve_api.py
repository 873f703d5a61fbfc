"""What Ray Serve says of the pools, and how it is asked for more or fewer workers: the REST API of Ray's dashboard.

Knows nothing of Ray's Python API, so that an autoscaler needs no Ray. A pool is one application with one deployment of
the same name.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from deploy.config import ray_token

STARTING, RUNNING, STOPPING = "STARTING", "RUNNING", "STOPPING"
_RUNNING_TOO = ("UPDATING", "RECOVERING", "PENDING_MIGRATION")
_TIMEOUT_S = 10.0


class ServeUnavailable(Exception):
    """The dashboard does not answer, or refuses; the message is one line."""


@dataclass(frozen=True, slots=True)
class ServeReplica:
    """One worker, as Serve counts it."""

    replica_id: str
    state: str
    """STARTING, RUNNING or STOPPING; others are taken for STARTING."""
    start_time_s: float
    """Unix time."""
    node_id: str
    """Ray's name of the node of its replica actor; "" before it is placed."""


@dataclass(frozen=True, slots=True)
class ServePool:
    """One pool, as Serve sees it."""

    status: str
    message: str
    target_num_replicas: int
    replicas: tuple[ServeReplica, ...]


@dataclass(frozen=True, slots=True)
class ServeState:
    """All pools at one time."""

    pools: dict[str, ServePool]
    head_node_id: str
    """Where Serve's controller is."""


class ServeApi:
    """The API of one Ray cluster. url: of its dashboard, such as http://HOST:8265."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def state(self) -> ServeState:
        """The pools that Serve runs. Raises ServeUnavailable."""
        found = self._call("GET", "/api/serve/applications/")
        pools = {
            name: _pool(application, application["deployments"][name])
            for name, application in found.get("applications", {}).items()
            if name in application.get("deployments", {})
        }
        return ServeState(pools, str((found.get("controller_info") or {}).get("node_id") or ""))

    def set_replicas(self, pool: str, num_replicas: int) -> None:
        """Ask for a number of workers; Serve starts or ends them later. Raises ServeUnavailable."""
        name = quote(pool, safe="")
        body = {"target_num_replicas": num_replicas}
        self._call("POST", f"/api/v1/applications/{name}/deployments/{name}/scale", body)

    def _call(self, method: str, path: str, body: dict[str, int] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **_authorization()}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                said = answer.read()
        except urllib.error.HTTPError as error:
            detail = " ".join(error.read(500).decode(errors="replace").split())
            raise ServeUnavailable(f"{method} {path}: {error.code} {detail}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServeUnavailable(f"{self._url}: {getattr(error, 'reason', None) or error}") from None
        try:
            answer = json.loads(said) if said.strip() else {}
        except ValueError:
            raise ServeUnavailable(f"{method} {path}: the answer is not JSON") from None
        return answer if isinstance(answer, dict) else {}


def _authorization() -> dict[str, str]:
    token = ray_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _pool(application: dict[str, Any], deployment: dict[str, Any]) -> ServePool:
    replicas = tuple(
        ServeReplica(str(r["replica_id"]), _state(r["state"]), float(r["start_time_s"]), str(r.get("node_id") or ""))
        for r in deployment.get("replicas", ())
    )
    message = str(deployment.get("message") or application.get("message") or "")
    return ServePool(str(application["status"]), message, int(deployment["target_num_replicas"]), replicas)


def _state(state: str) -> str:
    if state in (RUNNING, STOPPING):
        return state
    return RUNNING if state in _RUNNING_TOO else STARTING
