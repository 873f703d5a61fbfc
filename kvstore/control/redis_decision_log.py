"""Decisions of the cluster's autoscaler as lines of text in its control Redis, so that any part can show the last ones.

Bounded in number. Knows nothing of what a line says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.redis_client import REDIS_ERRORS, address_of, connect

PREFIX = "switchyard:autoscaler1:"
_MAX_LINES = 2000


class DecisionsUnavailable(Exception):
    """The Redis does not answer; the message is one line."""


class RedisDecisionLog:
    """Of one cluster. Every call may raise DecisionsUnavailable."""

    def __init__(self, url: str, cluster: str) -> None:
        self._redis = connect(url)
        self._key = f"{PREFIX}{cluster}:decisions"

    def append(self, lines: Sequence[str]) -> None:
        """Add lines; the oldest go."""
        try:
            pipeline = self._redis.pipeline()
            pipeline.rpush(self._key, *lines)
            pipeline.ltrim(self._key, -_MAX_LINES, -1)
            pipeline.execute()
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error

    def last(self, count: int = _MAX_LINES) -> list[str]:
        """The newest lines, oldest first."""
        try:
            lines: Any = self._redis.lrange(self._key, -count, -1)
        except REDIS_ERRORS as error:
            raise self._unavailable(error) from error
        return [line.decode() for line in lines]

    def close(self) -> None:
        """Give up the connection."""
        self._redis.close()

    def _unavailable(self, error: Exception) -> DecisionsUnavailable:
        return DecisionsUnavailable(f"{address_of(self._redis)}: {error}")
