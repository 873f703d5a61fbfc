"""How this package connects to a Redis: the only module that imports `redis`.

Knows nothing of what is kept there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.retry import Retry

RedisClient: TypeAlias = redis.Redis
RedisScript: TypeAlias = Script
RedisRefusal: TypeAlias = redis.ResponseError

REDIS_ERRORS: tuple[type[Exception], ...] = (redis.RedisError, OSError)
"""What a call raises when the server is away, is too slow or refuses the command."""

_CONNECT_TIMEOUT_S = 1.0
_CALL_TIMEOUT_S = 2.0
_READ_BYTES = 1024 * 1024


def connect(url: str) -> RedisClient:
    """A thread-safe client that connects when it is used. Raises ValueError for a URL that is none.

    A pooled connection that died since its last use is replaced and the call made once more; nothing else is retried.
    """
    return redis.Redis.from_url(
        url,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        socket_timeout=_CALL_TIMEOUT_S,
        socket_keepalive=True,
        socket_read_size=_READ_BYTES,
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    )


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


def address_of(client: RedisClient) -> str:
    """Where the client connects, without the password."""
    settings = client.connection_pool.connection_kwargs
    return str(settings.get("path") or f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}")
