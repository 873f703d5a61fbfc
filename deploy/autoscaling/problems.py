"""Problems that last: logged when they begin and when they are over, and once a minute in between."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

_AGAIN_S = 60.0


@dataclass(slots=True)
class _Lasting:
    began_s: float
    logged_s: float
    count: int = 1


class Problems:
    """By the part of the system that does not answer, or refuses."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lasting: dict[str, _Lasting] = {}

    def note(self, part: str, message: str) -> None:
        """It was seen now, perhaps again."""
        now_s = self._clock()
        known = self._lasting.get(part)
        if known is None:
            self._lasting[part] = _Lasting(now_s, now_s)
            log.warning("%s: %s", part, message)
            return
        known.count += 1
        if now_s - known.logged_s >= _AGAIN_S:
            known.logged_s = now_s
            log.warning("%s: for %.0f s now, %d times: %s", part, now_s - known.began_s, known.count, message)

    def over(self, part: str) -> None:
        """It was tried and worked; nothing happens if it did before."""
        known = self._lasting.pop(part, None)
        if known is not None:
            log.info("%s: works again, after %.0f s", part, self._clock() - known.began_s)
