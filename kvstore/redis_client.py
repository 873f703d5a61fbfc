"""How this package connects to a Redis: the only module that imports `redis`.

Knows nothing of what is kept there.
"""

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.retry import Retry

from kvstore.config import PASSWORD_FILE, check_redis_protocol
from kvstore.network.addresses import join_host_port

RedisClient: TypeAlias = redis.Redis
RedisScript: TypeAlias = Script
RedisRefusal: TypeAlias = redis.ResponseError

REDIS_ERRORS: tuple[type[Exception], ...] = (redis.RedisError, OSError)
"""What a call raises when the server is away, is too slow or refuses the command."""

NUM_HASH_SLOTS: int = REDIS_CLUSTER_HASH_SLOTS

_CONNECT_TIMEOUT_S = 1.0
_CALL_TIMEOUT_S = 2.0
_CHECK_TTL_MS = 1000
_PASSING = ("BUSY", "OOM", "command not allowed when used memory", "TRYAGAIN", "MASTERDOWN", "NOREPLICAS", "MISCONF")
_READ_BYTES = 1024 * 1024
_HOST_NAME = re.compile(r"[\w.-]+", re.ASCII)


def connect(url: str) -> RedisClient:
    """A thread-safe client that connects when it is used. Raises ValueError for a URL that is none, or that asks for
    another version of the protocol than kvstore.tiers.redis.redis_bulk reads.

    A pooled connection that died since its last use is replaced and the call made once more; nothing else is retried.
    """
    check_redis_protocol(url)
    url, password = _with_password(url)
    return redis.Redis.from_url(
        url,
        **password,
        protocol=2,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        socket_timeout=_CALL_TIMEOUT_S,
        socket_keepalive=True,
        socket_read_size=_READ_BYTES,
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    )


def _with_password(url: str) -> tuple[str, dict[str, str]]:
    """The URL without its password file, and what the file says."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    paths = [value for key, value in query if key == PASSWORD_FILE]
    if not paths:
        return url, {}
    left = urlencode([(key, value) for key, value in query if key != PASSWORD_FILE])
    return urlunsplit(parts._replace(query=left)), {"password": read_password(paths[-1])}


def read_password(path: str) -> str:
    """What a password file holds, less a line's end. Raises ValueError with the path."""
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


@contextmanager
def borrowed_connection(client: RedisClient) -> Iterator[tuple[Any, Any]]:
    """One of the client's connections, authenticated and in TLS where the URL says so, and its socket.

    The pool replaces one that died since its last use. After an error it is closed: what it still has is unknown.
    """
    connection: Any = client.connection_pool.get_connection()
    try:
        yield connection, connection._sock
    except BaseException:
        connection.disconnect()
        raise
    finally:
        client.connection_pool.release(connection)


def refused_commands(client: RedisClient, key: bytes) -> Exception | None:
    """Tries on a key of its own what a tier does with fragments: the refusal of a command that writes, if there is one.

    Raises one of REDIS_ERRORS when nothing can be read either. A key that belongs to another node of a cluster counts
    as taken: rights are looked at first.
    """
    pipeline = client.pipeline(transaction=False)
    pipeline.get(key)
    pipeline.exists(key)
    pipeline.set(key, b"", px=_CHECK_TTL_MS)
    pipeline.pexpire(key, _CHECK_TTL_MS)
    pipeline.delete(key)
    replies = pipeline.execute(raise_on_error=False)
    refusals = [reply if isinstance(reply, Exception) and redirection(reply) is None else None for reply in replies]
    for refusal in refusals[:2]:
        if refusal is not None:
            raise refusal
    return next((refusal for refusal in refusals if refusal is not None), None)


def is_misconfiguration(error: Exception) -> bool:
    """Whether a server repeats this error until its configuration changes: a wrong password, a missing
    right, TLS where there is none. One that is away, loading, full or read-only may come to itself."""
    passing = (redis.exceptions.BusyLoadingError, redis.exceptions.ReadOnlyError, redis.exceptions.ClusterDownError)
    if isinstance(error, redis.AuthenticationError):
        return True
    if isinstance(error, redis.ResponseError):
        return not isinstance(error, passing) and not str(error).startswith(_PASSING)
    chain = [error, error.__cause__, error.__context__]
    dropped = (ssl.SSLEOFError, ssl.SSLZeroReturnError)  # by a server that goes down
    return any(isinstance(cause, ssl.SSLError) and not isinstance(cause, dropped) for cause in chain)


def hash_slot(key: bytes) -> int:
    """Of a Redis cluster."""
    return int(key_slot(key))


@dataclass(frozen=True, slots=True)
class Redirection:
    """What a node of a cluster says of a key that it does not have because of the key's hash slot."""

    slot: int
    address: str
    """HOST:PORT of the slot's owner; empty: the slot is on its way, or the node does not name where to connect."""


def redirection(refusal: Exception) -> Redirection | None:
    """None when the refusal is another one. The client library takes the first word away and makes it a class."""
    text = str(refusal)
    is_moved = isinstance(refusal, redis.exceptions.MovedError) or text.startswith("MOVED ")
    if not is_moved and not isinstance(refusal, redis.exceptions.AskError) and not text.startswith("ASK "):
        return None
    slot, _, address = text.removeprefix("MOVED ").removeprefix("ASK ").partition(" ")
    if not slot.isdecimal() or int(slot) >= NUM_HASH_SLOTS:
        return None
    host, _, port = address.rpartition(":")
    return Redirection(int(slot), _host_port(host, port) if is_moved else "")


def slot_owners(client: RedisClient, address: str) -> tuple[str, ...]:
    """HOST:PORT by hash slot, as the node at HOST:PORT sees its cluster; empty where a slot has no owner, or its owner
    has no address.

    Raises what REDIS_ERRORS has, also when the server is no node of a cluster.
    """
    owners = [""] * NUM_HASH_SLOTS
    ask: Any = client.execute_command
    for first, last, (host, port, *_), *_ in ask("CLUSTER SLOTS"):
        # A node that does not know its own name gives none: then it is the one that was reached.
        name = host.decode(errors="replace") if host else address.rpartition(":")[0]
        owners[first : last + 1] = [_host_port(name, str(port))] * (last + 1 - first)
    return tuple(owners)


def _host_port(host: str, port: str) -> str:
    """HOST:PORT as a URL has it: an IPv6 address in brackets, whether it was or not. Empty when this is no address,
    such as the "?" of a node whose host name is not known."""
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        return ""
    if ":" not in host:
        return f"{host}:{int(port)}" if _HOST_NAME.fullmatch(host) else ""
    try:
        address = IPv6Address(host)
    except AddressValueError:
        return ""
    return "" if address.scope_id else f"[{host}]:{int(port)}"


def address_of(client: RedisClient) -> str:
    """Where the client connects, without the password."""
    settings = client.connection_pool.connection_kwargs
    return str(settings.get("path") or join_host_port(settings.get("host", "localhost"), settings.get("port", 6379)))
