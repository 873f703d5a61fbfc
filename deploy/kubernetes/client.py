"""How the Kubernetes API is reached: credentials, time-outs, and errors with names.

Credentials and TLS are the official client's, and so is the pool of connections. Objects are JSON in this package and
frozen dataclasses outside of it: the client's models and signatures change between its releases. Knows the resources
by path and nothing of what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import urllib3
from kubernetes import client, config
from kubernetes.config.incluster_config import InClusterConfigLoader

from deploy.errors import ConfigError, one_line

Json = dict[str, Any]

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PAGE = 250
_TIMEOUT_S = 5.0


class KubernetesError(Exception):
    """An API call did not do what was asked; the message is one line."""


class ApiUnreachable(KubernetesError):
    """No answer: nothing is known of whether the call was carried out."""


class ApiRefused(KubernetesError):
    """An answer that is not 2xx."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object, as paths and Roles name it."""

    group: str
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full_name(self) -> str:
        """As `kubectl auth can-i` takes it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str | None, name: str = "") -> str:
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if namespace is not None:
            parts += ["namespaces", namespace]
        parts += [self.plural, name] if name else [self.plural]
        return "/" + "/".join(quote(part, safe="") for part in parts)


LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
EVENTS = Resource("events.k8s.io", "v1", "events", "Event")
PODS = Resource("", "v1", "pods", "Pod")
NODES = Resource("", "v1", "nodes", "Node")
RAY_SERVICES = Resource("ray.io", "v1", "rayservices", "RayService")


class KubernetesApi:
    """Calls by resource. Every call ends after `timeout_s` at the latest, and is tried once. Safe between threads."""

    def __init__(self, configuration: client.Configuration, timeout_s: float = _TIMEOUT_S) -> None:
        self._configuration = configuration
        self._pool: urllib3.PoolManager = client.ApiClient(configuration).rest_client.pool_manager
        self._timeout_s = timeout_s

    def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        """One object."""
        return self._call("get", "GET", resource, namespace, name)

    def list(self, resource: Resource, namespace: str | None, **query: str) -> Iterator[Json]:
        """All objects, page after page; a filter such as `labelSelector="a=b"` may be given."""
        token = ""
        while True:
            asked = {**query, "limit": str(_PAGE), **({"continue": token} if token else {})}
            page = self._call("list", "GET", resource, namespace, query=asked)
            yield from page.get("items") or ()
            token = (page.get("metadata") or {}).get("continue") or ""
            if not token:
                return

    def create(self, resource: Resource, namespace: str, item: Json) -> Json:
        """A new object, as the server keeps it."""
        name = item["metadata"]["name"]
        made = {"apiVersion": resource.api_version, "kind": resource.kind, **item}
        return self._call("create", "POST", resource, namespace, name, made)

    def replace(self, resource: Resource, namespace: str, item: Json) -> Json:
        """Refused with 409 if the object has changed since it was read: `metadata.resourceVersion` says which was."""
        return self._call("update", "PUT", resource, namespace, item["metadata"]["name"], item)

    def close(self) -> None:
        """Closes the connections that are not in use."""
        self._pool.clear()

    def _call(
        self,
        verb: str,
        method: str,
        resource: Resource,
        namespace: str | None,
        name: str = "",
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Json:
        path = resource.path(namespace, "" if method == "POST" else name)
        url = self._configuration.host.rstrip("/") + path + (f"?{urlencode(query)}" if query else "")
        what = " ".join(
            filter(None, (verb, resource.full_name, name, f"in namespace {namespace}" if namespace else ""))
        )
        try:
            answer = self._pool.request(
                method,
                url,
                body=None if body is None else json.dumps(body).encode(),
                headers=self._headers(),
                timeout=urllib3.Timeout(total=self._timeout_s),
                retries=False,  # whoever calls tries again when it is due, and counts that time
            )
        except (urllib3.exceptions.HTTPError, OSError, config.ConfigException) as error:
            raise ApiUnreachable(f"could not {what}: {one_line(error)}") from error
        return _read(answer.status, answer.data, what)

    def _headers(self) -> dict[str, str]:
        # Asked for each time: this reads a token anew that has been rotated.
        auth = self._configuration.auth_settings().values()
        found = {part["key"]: part["value"] for part in auth if part["in"] == "header" and part["value"]}
        return {
            "Accept": "application/json",
            "Content-Type": "application/json",
            "User-Agent": "switchyard-autoscaler",
            **found,
        }


def _read(status: int, data: bytes, what: str) -> Json:
    try:
        answer = json.loads(data)
    except ValueError:
        answer = {"message": data[:200].decode(errors="replace").strip()}
    if not isinstance(answer, dict):
        answer = {"message": str(answer)[:200]}
    if 200 <= status < 300:
        if "kind" not in answer:  # a proxy or a wrong address, rather than the API
            raise ApiUnreachable(f"could not {what}: the answer is not an object of Kubernetes")
        return answer
    reason, message = str(answer.get("reason") or ""), one_line(str(answer.get("message") or "no reason given"))
    if status == 403:
        raise ApiRefused(status, reason, f"not allowed to {what}: {message}")
    if status == 401:
        raise ApiRefused(status, reason, f"could not {what}: the credentials are not accepted: {message}")
    raise ApiRefused(status, reason, f"could not {what}: {status} {reason}: {message}")


def in_cluster(credentials: Path = _SERVICE_ACCOUNT, timeout_s: float = _TIMEOUT_S) -> KubernetesApi:
    """For a pod, by its ServiceAccount's token, which is read anew every minute since it is rotated."""
    made = client.Configuration()
    loader = InClusterConfigLoader(str(credentials / "token"), str(credentials / "ca.crt"))
    try:
        loader.load_and_set(made)
    except (config.ConfigException, OSError) as error:
        raise ConfigError(f"not in a pod that may ask the Kubernetes API: {one_line(error)}") from None
    return KubernetesApi(made, timeout_s)


def from_kubeconfig(
    path: str | None = None, context: str | None = None, timeout_s: float = _TIMEOUT_S
) -> KubernetesApi:
    """For a person outside of the cluster. Empty: the file and context that kubectl would use."""
    made = client.Configuration()
    try:
        config.load_kube_config(path, context, client_configuration=made, persist_config=False)
    except (config.ConfigException, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"kubeconfig {path or 'of this user'}: {one_line(error)}") from None
    return KubernetesApi(made, timeout_s)


def own_namespace(credentials: Path = _SERVICE_ACCOUNT) -> str:
    """The namespace of the pod that this process runs in."""
    try:
        return (credentials / "namespace").read_text().strip()
    except OSError as error:
        raise ConfigError(f"not in a pod that may ask the Kubernetes API: {one_line(error)}") from None
