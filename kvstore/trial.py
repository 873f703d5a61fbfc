"""Tries the shared Redis and the disk with what they will be asked to do, before anything is started.

A wrong password, right or protocol is a mistake of the configuration; a server that is away or full is not.
Nothing is left behind. Knows nothing of who starts what.
"""

import contextlib
import secrets
import socket
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvstore.config import is_redis_cluster, redis_cluster_nodes
from kvstore.control import redis_directory, redis_journal
from kvstore.network.addresses import join_host_port
from kvstore.network.availability import one_line
from kvstore.redis_client import REDIS_ERRORS, connect, is_misconfiguration, refused_commands, slot_owners
from kvstore.tiers.disk.segments import LOCK_NAME, is_locked
from kvstore.tiers.redis.redis_tier import KEY_PREFIX

_DIAL_S = 1.0
_CONTROL_TRIAL = """
local key = KEYS[1]
redis.call('SET', key, '1', 'PX', 1000)
redis.call('TIME')
redis.call('INCR', key)
redis.call('APPEND', key, 'x')
redis.call('STRLEN', key)
redis.call('GET', key)
redis.call('PEXPIRE', key, 1000)
redis.call('EXISTS', key)
redis.call('DEL', key)
redis.call('HSET', key, 'field', 1)
redis.call('HINCRBY', key, 'field', 1)
redis.call('HGET', key, 'field')
redis.call('HMGET', key, 'field')
redis.call('DEL', key)
redis.call('SADD', key, 'x')
redis.call('SMEMBERS', key)
redis.call('SREM', key, 'x')
redis.call('ZADD', key, 1, 'x')
redis.call('ZCARD', key)
redis.call('ZREMRANGEBYSCORE', key, '-inf', 0)
redis.call('ZPOPMIN', key, 1)
redis.call('DEL', key)
"""


class TierMisconfigured(Exception):
    """It will not work until the configuration is another one; the message is one line without the key."""


def try_tier(url: str) -> str:
    """Why the shared tier does not do what it will be asked to do now; "" when it does. Raises TierMisconfigured."""
    if not is_redis_cluster(url):
        return _try_redis(url, partial(_raise_refusal, url))
    addresses, url_of = redis_cluster_nodes(url)
    problems = [
        _try_redis(url_of(address), partial(_look_at_cluster, url_of(address), address)) for address in addresses
    ]
    return problems[0] if all(problems) else ""  # any node tells of the others


def try_control(url: str, cluster: str) -> str:
    """The same for leases, directory and stream journal. A host that no name service knows is a mistake, too."""
    problem = _try_redis(url, partial(_run_control_script, url, cluster))
    if problem and _is_unknown_host(url):
        raise TierMisconfigured(f"Redis at {_address(url)}: there is no host of this name")
    return problem


def memory_risk(control: str, tier: str) -> str:
    """What a Redis for leases and journal does when its memory is full, where that may come; else "".

    A server that does not tell how much it may take is taken to have no limit.
    """
    try:
        with contextlib.closing(connect(control)) as client:
            memory: Any = client.info("memory")
    except REDIS_ERRORS:
        return ""
    policy, where = memory.get("maxmemory_policy", "noeviction"), _address(control)
    if not memory.get("maxmemory"):
        return ""
    if policy != "noeviction":
        return f"Redis at {where}: has a maxmemory and may drop leases when it is full (maxmemory-policy {policy})"
    if tier and not is_redis_cluster(tier) and _address(tier) == where:
        return f"Redis at {where}: has a maxmemory; once the tier has filled it no lease is kept and no worker found"
    return ""


def try_disk(folder: Path) -> str:
    """Why a disk tier cannot be kept in the folder now; "" when it can. Raises TierMisconfigured.

    A folder that another process holds may be that of this cluster's last node, which is about to end: the tier waits.
    """
    made: list[Path] = []
    try:
        for parent in reversed((folder, *folder.parents)):
            if not parent.exists():
                parent.mkdir(mode=0o700)
                made.append(parent)
        probe = folder / f"trial-{secrets.token_hex(4)}"
        probe.write_bytes(b"x")
        probe.unlink()
        return f"{folder}: another process holds it" if is_locked(folder / LOCK_NAME) else ""
    except OSError as error:
        raise TierMisconfigured(f"{folder}: {error.strerror.lower() if error.strerror else error}") from None
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # it is in use by now
                parent.rmdir()


def _try_redis(url: str, trial: Callable[[], None]) -> str:
    where = _address(url)
    try:
        trial()
    except REDIS_ERRORS as error:
        if is_misconfiguration(error):
            raise TierMisconfigured(f"Redis at {where}: {one_line(error)}") from None
        if url.startswith("redis://") and _speaks_tls(url):
            raise TierMisconfigured(f"Redis at {where}: speaks TLS: its URL begins with rediss://") from None
        if url.startswith("rediss://") and _speaks_plainly(url):
            raise TierMisconfigured(f"Redis at {where}: does not speak TLS: its URL begins with redis://") from None
        return f"Redis at {where}: {one_line(error)}"
    except (TypeError, ValueError) as error:  # the client's library, of an option that it does not know or understand
        raise TierMisconfigured(f"Redis at {where}: {one_line(error)}") from None
    return ""


def _raise_refusal(url: str) -> None:
    with contextlib.closing(connect(url)) as client:
        refusal = refused_commands(client, KEY_PREFIX + b"trial")
        if refusal is not None:
            raise refusal


def _look_at_cluster(url: str, address: str) -> None:
    with contextlib.closing(connect(url)) as client:
        slot_owners(client, address)
    _raise_refusal(url)


def _run_control_script(url: str, cluster: str) -> None:
    """Scripts with the commands of directory and journal, under both of their prefixes."""
    with contextlib.closing(connect(url)) as client:
        script = client.register_script(_CONTROL_TRIAL)
        for prefix in (redis_directory.PREFIX, redis_journal.PREFIX):
            script(keys=[prefix + cluster.encode() + b":trial-" + secrets.token_hex(8).encode()])


def _is_unknown_host(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.getaddrinfo(parts.hostname or "localhost", parts.port or 6379)
    except socket.gaierror as error:
        return error.errno == socket.EAI_NONAME  # others may pass, as when no name server answers
    except UnicodeError:
        return True  # cannot be the name of a host
    return False


def _speaks_tls(url: str) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _dial(url) as plain, context.wrap_socket(plain):
            return True
    except (OSError, ValueError):
        return False


def _speaks_plainly(url: str) -> bool:
    try:
        with _dial(url) as plain:
            plain.sendall(b"PING\r\n")
            return plain.recv(1) in (b"+", b"-")  # -NOAUTH is an answer, too
    except (OSError, ValueError):
        return False


def _dial(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "localhost", parts.port or 6379), _DIAL_S)


def _address(url: str) -> str:
    parts = urlsplit(url)
    return join_host_port(parts.hostname or parts.path or "localhost", parts.port or 6379)
