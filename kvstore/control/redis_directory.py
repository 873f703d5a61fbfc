"""A directory that outlives every process of the cluster: leases and block locations in a Redis that must not evict.

Behind `switchyard:control1:CLUSTER:` there are

    worker:ID     hash {epoch, record}, with the lease's TTL       workers   set of the IDs that had a lease
    epoch         counter                                           blocks    sorted set: names by time of publication
    block:NAME    set of locations, with a TTL

Each change is one script, so it happens whole or not at all. Knows nothing of fragments or of what a location is.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvstore.control.directory import (
    DEFAULT_BLOCK_TTL_S,
    DEFAULT_MAX_BLOCKS,
    DirectoryUnavailable,
    LeasedWorker,
    WorkerRecord,
    check_keep_alive,
)
from kvstore.redis_client import REDIS_ERRORS, RedisScript, address_of, connect

PREFIX = b"switchyard:control1:"

_CHUNK_BLOCKS = 512  # a script holds up everybody else's commands: keep each one short

# Epochs start at the server's time in milliseconds, so they grow even when Redis comes back without its last writes.
_KEEP_ALIVE = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
local held = tonumber(ARGV[4])
if not epoch and held > 0 then
  epoch = held
  if tonumber(redis.call('GET', KEYS[2]) or 0) < held then
    redis.call('SET', KEYS[2], string.format('%.0f', held))
  end
elseif not epoch then
  local time = redis.call('TIME')
  local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  if tonumber(redis.call('GET', KEYS[2]) or 0) < now_ms then
    redis.call('SET', KEYS[2], string.format('%.0f', now_ms))
  end
  epoch = redis.call('INCR', KEYS[2])
end
redis.call('HSET', KEYS[1], 'epoch', string.format('%.0f', epoch), 'record', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('SADD', KEYS[3], ARGV[3])
return tonumber(epoch)
"""

# KEYS: workers; ARGV: prefix of the leases.
_WORKERS = """
local found = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local lease = redis.call('HMGET', ARGV[1] .. id, 'epoch', 'record')
  if lease[1] then
    table.insert(found, lease[1])
    table.insert(found, lease[2])
  else
    redis.call('SREM', KEYS[1], id)
  end
end
return found
"""

# KEYS: blocks; ARGV: prefix of the blocks, location, TTL in ms, most blocks, then the names.
_PUBLISH = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 5, #ARGV do
  redis.call('SADD', ARGV[1] .. ARGV[i], ARGV[2])
  redis.call('PEXPIRE', ARGV[1] .. ARGV[i], ARGV[3])
  redis.call('ZADD', KEYS[1], now_ms, ARGV[i])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms - ARGV[3])
local num_excess = redis.call('ZCARD', KEYS[1]) - ARGV[4]
if num_excess > 0 then
  local oldest = redis.call('ZPOPMIN', KEYS[1], num_excess)
  for i = 1, #oldest, 2 do
    redis.call('DEL', ARGV[1] .. oldest[i])
  end
end
return 0
"""


class RedisDirectory:
    """A client of the Redis at `url`, for one cluster of those that use it.

    Blocks are bounded in number (oldest go first) and in age.
    """

    def __init__(
        self,
        url: str,
        cluster: str = "",
        max_blocks: int = DEFAULT_MAX_BLOCKS,
        block_ttl_s: float = DEFAULT_BLOCK_TTL_S,
    ) -> None:
        self._client = connect(url)
        self._prefix = PREFIX + cluster.encode() + b":"
        self._max_blocks = max_blocks
        self._block_ttl_ms = int(block_ttl_s * 1000)
        self._keep_alive = self._client.register_script(_KEEP_ALIVE)
        self._workers = self._client.register_script(_WORKERS)
        self._publish = self._client.register_script(_PUBLISH)

    def keep_alive(self, record: WorkerRecord, ttl_s: float, held_epoch: int = 0) -> int:
        """As in Directory."""
        check_keep_alive(record, ttl_s)
        keys = [self._lease_key(record.worker_id), self._prefix + b"epoch", self._prefix + b"workers"]
        ttl_ms = max(1, int(ttl_s * 1000))
        arguments = [json.dumps(asdict(record)), ttl_ms, record.worker_id, held_epoch]
        return int(self._run(self._keep_alive, keys, arguments))

    def withdraw(self, worker_id: str) -> None:
        """As in Directory."""
        try:
            self._client.delete(self._lease_key(worker_id))  # workers() clears the set
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error

    def workers(self) -> list[LeasedWorker]:
        """As in Directory."""
        flat = self._run(self._workers, [self._prefix + b"workers"], [self._lease_key("")])
        pairs = zip(flat[0::2], flat[1::2], strict=True)
        workers = [LeasedWorker(_record(raw), int(epoch)) for epoch, raw in pairs]
        return sorted(workers, key=lambda worker: worker.record.worker_id)

    def publish(self, block_names: Sequence[bytes], location: str) -> None:
        """As in Directory."""
        for start in range(0, len(block_names), _CHUNK_BLOCKS):
            names = block_names[start : start + _CHUNK_BLOCKS]
            settings = [self._prefix + b"block:", location, self._block_ttl_ms, self._max_blocks]
            self._run(self._publish, [self._prefix + b"blocks"], [*settings, *names])

    def locate(self, block_names: Sequence[bytes]) -> list[frozenset[str]]:
        """As in Directory."""
        located: list[frozenset[str]] = []
        try:
            for start in range(0, len(block_names), _CHUNK_BLOCKS):
                pipeline = self._client.pipeline(transaction=False)
                for name in block_names[start : start + _CHUNK_BLOCKS]:
                    pipeline.smembers(self._prefix + b"block:" + name)
                located.extend(
                    frozenset(location.decode() for location in locations) for locations in pipeline.execute()
                )
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error
        return located

    def close(self) -> None:
        """As in Directory."""
        self._client.close()

    def _run(self, script: RedisScript, keys: list[bytes], arguments: list[Any]) -> Any:
        try:
            return script(keys=keys, args=arguments)
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error

    def _lease_key(self, worker_id: str) -> bytes:
        return self._prefix + b"worker:" + worker_id.encode()

    def _unavailable(self, error: Exception) -> DirectoryUnavailable:
        return DirectoryUnavailable(f"directory at {address_of(self._client)}: {error}")


def _record(raw: bytes) -> WorkerRecord:
    fields = json.loads(raw)
    return WorkerRecord(
        worker_id=fields["worker_id"],
        address=fields["address"],
        pool=fields["pool"],
        role=fields["role"],
        node_id=fields["node_id"],
    )
