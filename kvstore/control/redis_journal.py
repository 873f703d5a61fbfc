"""A journal that outlives every machine of the cluster, in a Redis that must not evict.

Behind `switchyard:journal1:CLUSTER:` there are

    {ID}         hash {epoch, header, ending}        {ID}:tokens   string: the committed ids, 4 bytes each

Each change is one script, so it happens whole or not at all. Knows nothing of what headers and endings mean.
"""

from collections.abc import Sequence

from kvstore.control.journal import (
    DEFAULT_TTL_S,
    Change,
    JournalEntry,
    JournalUnavailable,
    Verdict,
    pack_token_ids,
    unpack_token_ids,
)
from kvstore.redis_client import REDIS_ERRORS, address_of, connect

PREFIX = b"switchyard:journal1:"

# KEYS: stream, tokens; ARGV: epoch, position, packed ids, ending, TTL in ms, whether it opens, header.
_COMMIT = """
local epoch = tonumber(redis.call('HGET', KEYS[1], 'epoch'))
if epoch and epoch > tonumber(ARGV[1]) then
  return 'superseded'
end
if ARGV[6] == '1' then
  redis.call('DEL', KEYS[1], KEYS[2])
  redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'header', ARGV[7], 'ending', '')
elseif epoch ~= tonumber(ARGV[1]) then
  return 'missing'
end
if redis.call('STRLEN', KEYS[2]) ~= 4 * tonumber(ARGV[2]) then
  return 'missing'
end
if ARGV[3] ~= '' then
  redis.call('APPEND', KEYS[2], ARGV[3])
end
redis.call('HSET', KEYS[1], 'ending', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return 'committed'
"""

# KEYS: stream, tokens; ARGV: what to add to the epoch, TTL in ms.
_FIND = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  return false
end
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return {epoch, redis.call('HGET', KEYS[1], 'header'), redis.call('GET', KEYS[2]) or '',
        redis.call('HGET', KEYS[1], 'ending')}
"""


class RedisJournal:
    """As in StreamJournal."""

    def __init__(self, url: str, cluster: str = "", ttl_s: float = DEFAULT_TTL_S) -> None:
        self._redis = connect(url)
        self._prefix = PREFIX + cluster.encode() + b":"
        self._ttl_ms = round(ttl_s * 1000)
        self._commit = self._redis.register_script(_COMMIT)
        self._find = self._redis.register_script(_FIND)

    def commit(self, changes: Sequence[Change]) -> list[Verdict]:
        """As in StreamJournal."""
        try:
            pipeline = self._redis.pipeline(transaction=False)
            for change in changes:
                arguments: list[int | str | bytes] = [
                    change.epoch,
                    change.position,
                    pack_token_ids(change.token_ids),
                    change.ending,
                    self._ttl_ms,
                    int(change.header is not None),
                    change.header or b"",
                ]
                self._commit(self._keys(change.stream_id), arguments, client=pipeline)
            return [Verdict(word.decode()) for word in pipeline.execute()]
        except REDIS_ERRORS as error:
            raise JournalUnavailable(f"{address_of(self._redis)}: {error}") from error

    def look_up(self, stream_id: str) -> JournalEntry | None:
        """As in StreamJournal."""
        return self._entry(stream_id, epochs_further=0)

    def claim(self, stream_id: str) -> JournalEntry | None:
        """As in StreamJournal."""
        return self._entry(stream_id, epochs_further=1)

    def close(self) -> None:
        """As in StreamJournal."""
        self._redis.close()

    def _entry(self, stream_id: str, epochs_further: int) -> JournalEntry | None:
        try:
            found = self._find(self._keys(stream_id), [epochs_further, self._ttl_ms])
        except REDIS_ERRORS as error:
            raise JournalUnavailable(f"{address_of(self._redis)}: {error}") from error
        if found is None:
            return None
        epoch, header, packed, ending = found
        return JournalEntry(int(epoch), header, unpack_token_ids(packed), ending.decode())

    def _keys(self, stream_id: str) -> list[bytes]:
        # The braces keep both keys of a stream on one node of a Redis cluster.
        key = self._prefix + b"{" + stream_id.encode() + b"}"
        return [key, key + b":tokens"]
