"""Adapters of a cluster in a Redis that must not evict: the hash `switchyard:adapters1:CLUSTER`, name to record.

Knows nothing of what a record says.
"""

from typing import Any

from kvstore.control.adapter_registry import AdapterRecord, RecordReader, RegistryUnavailable
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
        self._reader = RecordReader()
        self._replace = self._redis.register_script(_REPLACE)

    def records(self) -> list[AdapterRecord]:
        """As in AdapterRegistry."""
        try:
            found: Any = self._redis.hvals(self._key)
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error
        records = (self._reader.read(text) for text in found)
        return sorted((record for record in records if record is not None), key=lambda record: record.name)

    def find(self, name: str) -> AdapterRecord | None:
        """As in AdapterRegistry."""
        text = self._text(name)
        return None if text is None else self._reader.read(text)

    def replace(self, name: str, old: AdapterRecord | None, new: AdapterRecord | None) -> bool:
        """As in AdapterRegistry."""
        before, after = ("" if record is None else record.packed() for record in (old, new))
        if self._change(name, before, after):
            return True
        there = self._text(name) if old is None else None
        return there is not None and self._reader.read(there) is None and self._change(name, there, after)

    def close(self) -> None:
        """As in AdapterRegistry."""
        self._redis.close()

    def _text(self, name: str) -> str | bytes | None:
        try:
            found: Any = self._redis.hget(self._key, name)
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error
        return found  # type: ignore[no-any-return]

    def _change(self, name: str, before: str | bytes, after: str) -> bool:
        try:
            return bool(self._replace([self._key], [name, before, after]))
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> RegistryUnavailable:
        return RegistryUnavailable(f"adapter registry at {address_of(self._redis)}: {error}")
