"""Adapters of a cluster in a Redis that must not evict: the hash `switchyard:adapters1:CLUSTER`, name to record.

Knows nothing of what a record says.
"""

from typing import Any

from kvstore.control.adapter_registry import AdapterRecord, RegistryUnavailable
from kvstore.redis_client import REDIS_ERRORS, address_of, connect

PREFIX = "switchyard:adapters1:"

# KEYS: records; ARGV: name, old record or '', new record or ''.
_REPLACE = """
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then
  return 0
end
if ARGV[3] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
return 1
"""


class RedisAdapterRegistry:
    """As in AdapterRegistry."""

    def __init__(self, url: str, cluster: str = "") -> None:
        self._redis = connect(url)
        self._key = PREFIX + cluster
        self._replace = self._redis.register_script(_REPLACE)

    def records(self) -> list[AdapterRecord]:
        """As in AdapterRegistry."""
        try:
            found: Any = self._redis.hvals(self._key)
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error
        return sorted(map(AdapterRecord.unpacked, found), key=lambda record: record.name)

    def find(self, name: str) -> AdapterRecord | None:
        """As in AdapterRegistry."""
        try:
            found: Any = self._redis.hget(self._key, name)
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error
        return None if found is None else AdapterRecord.unpacked(found)

    def replace(self, name: str, old: AdapterRecord | None, new: AdapterRecord | None) -> bool:
        """As in AdapterRegistry."""
        arguments = [name, *("" if record is None else record.packed() for record in (old, new))]
        try:
            return bool(self._replace([self._key], arguments))
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error

    def close(self) -> None:
        """As in AdapterRegistry."""
        self._redis.close()

    def _unavailable(self, error: Exception) -> RegistryUnavailable:
        return RegistryUnavailable(f"adapter registry at {address_of(self._redis)}: {error}")
