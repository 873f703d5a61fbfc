"""What Ray Serve says of the pools, and how it is asked for more or fewer workers: the REST API of Ray's dashboard.

Knows nothing of Ray's Python API, so that an autoscaler needs no Ray. A pool is one application with one deployment of
the same name. What a dashboard answers is checked before anything is concluded from it: an answer that is not as
expected is no answer.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from deploy.config import ray_token

STARTING, RUNNING, STOPPING = "STARTING", "RUNNING", "STOPPING"
_LAST_S = 1e11  # Unix time, the year 5138
_RUNNING_TOO = ("UPDATING", "RECOVERING", "PENDING_MIGRATION")
_TIMEOUT_S = 10.0
_MOST_BYTES = 64 * 2**20


class ServeUnavailable(Exception):
    """The dashboard does not answer, refuses, or says something odd; the message is one line."""


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
    """The API of one Ray cluster. url: of its dashboard, such as http://HOST:8265. pools: those that are configured."""

    def __init__(self, url: str, pools: Collection[str] = (), timeout_s: float = _TIMEOUT_S) -> None:
        self._url = url.rstrip("/")
        self._pools = pools
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        # Of the call under way. A SimpleQueue may be put to by a signal's handler.
        self._outcome: queue.SimpleQueue[bytes | ServeUnavailable] = queue.SimpleQueue()
        self._is_closed = False

    def close(self) -> None:
        """End the call under way, and each later one, with ServeUnavailable. May be called by a signal's handler."""
        self._is_closed = True
        self._outcome.put(ServeUnavailable(f"{self._url}: given up"))

    def state(self) -> ServeState:
        """The pools that Serve runs. Raises ServeUnavailable."""
        path = "/api/serve/applications/"
        try:
            state = _state(self._call("GET", path))
        except _Odd as odd:
            raise ServeUnavailable(f"GET {path}: {odd}") from None
        if self._pools and state.pools.keys().isdisjoint(self._pools):  # another cluster, or one that has just begun
            raise ServeUnavailable(f"GET {path}: Serve runs none of the pools {', '.join(self._pools)}")
        return state

    def set_replicas(self, pool: str, num_replicas: int) -> None:
        """Ask for a number of workers; Serve starts or ends them later. Raises ServeUnavailable."""
        name = quote(pool, safe="")
        path = f"/api/v1/applications/{name}/deployments/{name}/scale"
        self._call("POST", path, {"target_num_replicas": num_replicas})

    def _call(self, method: str, path: str, body: dict[str, int] | None = None) -> object:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **_authorization()}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        outcome = self._outcome = queue.SimpleQueue()
        if self._is_closed:  # before the new queue was there
            raise ServeUnavailable(f"{self._url}: given up")
        # In a thread: only so a call can be given up, and ends in time where a byte comes now and then.
        threading.Thread(target=self._ask, args=(request, path, outcome), name="dashboard", daemon=True).start()
        try:
            said = outcome.get(timeout=self._timeout_s)
        except queue.Empty:
            raise self._no_answer_in_time() from None
        if isinstance(said, ServeUnavailable):
            raise said
        try:
            return json.loads(said) if said.strip() else {}
        except (ValueError, RecursionError):
            raise ServeUnavailable(f"{method} {path}: the answer is not JSON, but begins {said[:40]!r}") from None

    def _ask(
        self, request: urllib.request.Request, path: str, outcome: queue.SimpleQueue[bytes | ServeUnavailable]
    ) -> None:
        where = f"{request.get_method()} {path}"
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                said = answer.read(_MOST_BYTES + 1)
            too_long = ServeUnavailable(f"{where}: the answer is longer than {_MOST_BYTES} bytes")
            outcome.put(said if len(said) <= _MOST_BYTES else too_long)
        except urllib.error.HTTPError as error:
            outcome.put(ServeUnavailable(f"{where}: {error.code} {_detail(error)}"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):  # the socket's, which may be sooner than that of the whole call
                outcome.put(self._no_answer_in_time())
            else:
                outcome.put(ServeUnavailable(f"{self._url}: {str(reason) or type(error).__name__}"))

    def _no_answer_in_time(self) -> ServeUnavailable:
        return ServeUnavailable(f"{self._url}: no answer within {self._timeout_s:g} s")


def _authorization() -> dict[str, str]:
    token = ray_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(500).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        return str(error.reason)


# ---- what an answer says


class _Odd(Exception):
    """A part of an answer that is not as expected: its path, and what is odd."""


def _state(answer: object) -> ServeState:
    found = _mapping(answer, "the answer")
    pools = {}
    for name, said in _mapping(_part(found, "applications", ""), "applications").items():
        where = f"applications.{name}"
        application = _mapping(said, where)
        deployments = _mapping(_part(application, "deployments", where), f"{where}.deployments")
        if name in deployments:
            pools[name] = _pool(application, deployments[name], where, f"{where}.deployments.{name}")
    controller = _mapping(found.get("controller_info") or {}, "controller_info")
    return ServeState(pools, _text_or_none(controller, "node_id", "controller_info"))


def _pool(application: Mapping[str, object], said: object, above: str, where: str) -> ServePool:
    deployment = _mapping(said, where)
    replicas = tuple(
        _replica(replica, f"{where}.replicas.{i}")
        for i, replica in enumerate(_list(_part(deployment, "replicas", where), f"{where}.replicas"))
    )
    message = _text_or_none(deployment, "message", where) or _text_or_none(application, "message", above)
    wanted = _part(deployment, "target_num_replicas", where)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 0:
        raise _Odd(f"{where}.target_num_replicas is {_shown(wanted)}, not a number of workers")
    return ServePool(_text(application, "status", above), message, wanted, replicas)


def _replica(said: object, where: str) -> ServeReplica:
    replica = _mapping(said, where)
    began_s = _part(replica, "start_time_s", where)
    if not isinstance(began_s, int | float) or isinstance(began_s, bool) or not abs(began_s) <= _LAST_S:
        raise _Odd(f"{where}.start_time_s is {_shown(began_s)}, not a time")
    state = _text(replica, "state", where)
    known = state if state in (RUNNING, STOPPING) else RUNNING if state in _RUNNING_TOO else STARTING
    node_id = _text_or_none(replica, "node_id", where)
    return ServeReplica(_text(replica, "replica_id", where), known, float(began_s), node_id)


def _part(found: Mapping[str, object], key: str, where: str) -> object:
    if key not in found:
        raise _Odd(f"{where}.{key} is missing".removeprefix("."))
    return found[key]


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _Odd(f"{where} is {_shown(value)}, not keys and values")
    return value


def _list(value: object, where: str) -> Sequence[object]:
    if not isinstance(value, list):
        raise _Odd(f"{where} is {_shown(value)}, not a list")
    return value


def _text(found: Mapping[str, object], key: str, where: str) -> str:
    value = _part(found, key, where)
    if not isinstance(value, str) or not value:
        raise _Odd(f"{where}.{key} is {_shown(value)}, not a text")
    return value


def _text_or_none(found: Mapping[str, object], key: str, where: str) -> str:
    return "" if not found.get(key) else _text(found, key, where)


def _shown(value: object) -> str:
    said = json.dumps(value)
    return said if len(said) <= 40 else f"{said[:40]}..."
