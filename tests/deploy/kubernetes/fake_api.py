"""A fake Kubernetes API server: real HTTP on loopback, objects in memory.

Bearer tokens, Roles as manifests have them, versions with 409 on stale writes, patches by content type, watches with
bookmarks and 410. tests/helm/test_real_api_server.py holds it against a real server with the requests of
contract.py.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from kubernetes import client as official

from deploy.kubernetes.client import KubernetesApi
from tests.deploy.kubernetes.store import KINDS, Json, Kind, StatusError, Store

_PATCHES = ("application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json")
_BOOKMARK_S = 0.05
ADMIN = "admin-token"


@dataclass(frozen=True)
class Seen:
    """A request that was answered."""

    user: str
    verb: str
    resource: str
    name: str
    status: int


@dataclass(frozen=True)
class _Asked:
    """A request's path and query, understood."""

    kind: Kind
    namespace: str
    name: str
    query: dict[str, str]


class FakeKubernetes:
    """The server. `tokens` says who is who, `roles` what each user may do; the admin may do everything."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.store = Store()
        self.tokens = {ADMIN: "admin"}
        self.roles: dict[str, Sequence[Json]] = {}
        self.seen: list[Seen] = []
        self.before_write: Callable[[], None] | None = None
        """Called once, before the next write is looked at: another writer that is faster."""
        self.intercept: Callable[[], None] | None = None
        """While set: called for each request, which then gets no answer."""
        self._server: _Server | None = None
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listens, again on the port of the first time."""
        self._server = _Server(("127.0.0.1", self._port), self)
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """As if the machine were away: connections end, new ones are refused. Objects stay."""
        if self._server is not None:
            self._server.end()
            self._server = None

    def add(self, item: Json, namespace: str = "prod") -> Json:
        """Makes an object, without HTTP."""
        (kind,) = [kind for kind in KINDS if (kind.api_version, kind.kind) == (item["apiVersion"], item["kind"])]
        return self.store.create(kind, namespace if kind.is_namespaced else "", item)

    def answer(self, method: str, target: str, token: str, content_type: str, body: bytes) -> tuple[int, Any]:
        """Status and object of a request; an iterator of events for a watch."""
        user = self._user(token)
        asked = _understand(target)
        verb = _verb(method, asked)
        try:
            self._authorize(user, verb, asked)
            if not asked.kind.plural:
                known = any(kind.group == asked.kind.group for kind in KINDS)
                raise StatusError(404, "NotFound" if known else "", "the server could not find the requested resource")
            if method != "GET" and (method == "POST") == bool(asked.name):
                raise StatusError(405, "MethodNotAllowed", "the server does not allow this method on the resource")
            status, answer = self._carry_out(method, verb, asked, content_type, body)
        except StatusError as error:
            status, answer = error.code, error.body()
        self.seen.append(Seen(user, verb, asked.kind.full_name, asked.name, status))
        return status, answer

    def _user(self, token: str) -> str:
        if not token:
            return "system:anonymous"
        if token not in self.tokens:
            raise StatusError(401, "Unauthorized", "Unauthorized")
        return self.tokens[token]

    def _authorize(self, user: str, verb: str, asked: _Asked) -> None:
        kind, name = asked.kind, "" if verb == "create" else asked.name
        for rule in self.roles.get(user, ()) if kind.is_namespaced else ():
            fits = verb in rule["verbs"] and kind.plural in rule["resources"] and kind.group in rule["apiGroups"]
            if fits and (not rule.get("resourceNames") or name in rule["resourceNames"]):
                return
        if user != "admin":
            where = f' in the namespace "{asked.namespace}"' if kind.is_namespaced else " at the cluster scope"
            quoted = f' "{name}"' if name else ""
            raise StatusError(
                403,
                "Forbidden",
                f'{kind.full_name}{quoted} is forbidden: User "{user}" cannot {verb} resource "{kind.plural}" '
                f'in API group "{kind.group}"{where}',
            )

    def _carry_out(self, method: str, verb: str, asked: _Asked, content_type: str, body: bytes) -> tuple[int, Any]:
        store, where = self.store, (asked.kind, asked.namespace)
        if method in ("POST", "PUT", "PATCH"):
            given = _decode(method, asked.kind, content_type, body)
            race, self.before_write = self.before_write, None
            if race is not None:
                race()
            if method == "POST":
                return 201, store.create(*where, given)
            if method == "PUT":
                return 200, store.replace(*where, asked.name, given)
            return 200, store.patch(*where, asked.name, content_type, given)
        if method == "DELETE":
            return 200, store.delete(*where, asked.name)
        if asked.name:
            return 200, store.get(*where, asked.name)
        return 200, self._watch(asked) if verb == "watch" else self._list(asked)

    def _list(self, asked: _Asked) -> Json:
        after = asked.query.get("continue", "")
        version, _, last = after.partition("/")
        if after and self.store.is_gone(int(version)):
            raise StatusError(410, "Expired", "The provided continue parameter is too old")
        items = [
            item
            for item in self.store.list(asked.kind, asked.namespace)
            if _selected(item, asked.query) and item["metadata"]["name"] > last
        ]
        limit = int(asked.query.get("limit") or 0) or len(items)
        metadata = {"resourceVersion": version or str(self.store.version)}
        if len(items) > limit:
            metadata["continue"] = f"{metadata['resourceVersion']}/{items[limit - 1]['metadata']['name']}"
        kind = asked.kind
        return {
            "kind": f"{kind.kind}List",
            "apiVersion": kind.api_version,
            "metadata": metadata,
            "items": items[:limit],
        }

    def _watch(self, asked: _Asked) -> Iterator[Json]:
        version = int(asked.query.get("resourceVersion") or self.store.version)
        ends_at = time.monotonic() + float(asked.query.get("timeoutSeconds") or 3600)
        while time.monotonic() < ends_at:
            with self.store.changed:
                news = list(self.store.events_since(asked.kind, asked.namespace, version))
                gone, latest = self.store.is_gone(version), self.store.version
                if not news and not gone:
                    self.store.changed.wait(_BOOKMARK_S)
            if gone:
                message = f"too old resource version: {version} ({latest})"
                yield {"type": "ERROR", "object": StatusError(410, "Expired", message).body()}
                return
            version = latest
            yield from ({"type": what, "object": item} for what, item in news if _selected(item, asked.query))
            if asked.query.get("allowWatchBookmarks") == "true":
                yield {"type": "BOOKMARK", "object": _bookmark(asked.kind, version)}


def _bookmark(kind: Kind, version: int) -> Json:
    metadata = {"resourceVersion": str(version), "creationTimestamp": None}
    return {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": metadata}


def _understand(target: str) -> _Asked:
    parts = urlsplit(target)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    words = [unquote(word) for word in parts.path.strip("/").split("/")]
    group, words = ("", words[1:]) if words[0] == "api" else ("".join(words[1:2]), words[2:])
    version, words = "".join(words[:1]), words[1:]
    namespace = ""
    if words[:1] == ["namespaces"] and len(words) > 2:
        namespace, words = words[1], words[2:]
    plural, name = "".join(words[:1]), "".join(words[1:2])
    for kind in KINDS:
        if (kind.group, kind.version, kind.plural) == (group, version, plural):
            return _Asked(kind, namespace, name, query)
    return _Asked(Kind(group, version, "", ""), namespace, name, query)


def _verb(method: str, asked: _Asked) -> str:
    if method == "GET":
        return "get" if asked.name else ("watch" if asked.query.get("watch") in ("1", "true") else "list")
    return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(method, method.lower())


def _decode(method: str, kind: Kind, content_type: str, body: bytes) -> Any:
    if method == "PATCH":
        if content_type not in (_PATCHES[:2] if kind.is_custom else _PATCHES):
            raise StatusError(415, "UnsupportedMediaType", "the body of the request was in an unknown format")
    elif content_type != "application/json":
        raise StatusError(415, "UnsupportedMediaType", "the body of the request was in an unknown format")
    try:
        return json.loads(body)
    except ValueError as error:
        raise StatusError(400, "BadRequest", f"the object provided is unrecognized: {error}") from None


def _selected(item: Json, query: dict[str, str]) -> bool:
    labels = item["metadata"].get("labels") or {}
    wanted = [part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part]
    name = query.get("fieldSelector", "").removeprefix("metadata.name=")
    return all(labels.get(key) == value for key, value in wanted) and name in ("", item["metadata"]["name"])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], api: FakeKubernetes) -> None:
        self.api = api
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        for open_socket in list(self._open):
            with suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):
            super().handle_one_request()
            return
        self.close_connection = True

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        content_type = (self.headers.get("Content-Type") or "application/json").partition(";")[0].strip()
        if self.server.api.intercept is not None:
            self.server.api.intercept()
            self.close_connection = True
            return
        try:
            status, answer = self.server.api.answer(self.command, self.path, token, content_type, body)
        except StatusError as error:
            status, answer = error.code, error.body()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if isinstance(answer, dict):
            data = json.dumps(answer).encode()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in answer:
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Not to stderr."""


def api_of(fake: FakeKubernetes, token: str = ADMIN, timeout_s: float = 5.0) -> KubernetesApi:
    """Reaches the fake with a token."""
    configuration = official.Configuration(host=fake.url)
    configuration.api_key["authorization"] = f"bearer {token}"
    return KubernetesApi(configuration, timeout_s)


def self_signed(folder: Path) -> ssl.SSLContext:
    """For a server on 127.0.0.1; `ca.crt` in the folder is what its clients trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fake")])
    now = datetime.now(UTC)
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(loopback, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(made.public_bytes(Encoding.PEM))
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key.pem")
    return context
