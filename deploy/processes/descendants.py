"""The processes below this one, and their end. Knows nothing of what they do."""

from __future__ import annotations

import contextlib
import time

import psutil

_END_S = 5.0
_LOOK_S = 0.1


class Descendants:
    """Those that were started after this was made."""

    def __init__(self) -> None:
        self._before = set(_below())

    def kill(self) -> None:
        """SIGKILL for all that live; returns when they are gone, or after a few seconds."""
        deadline_s = time.monotonic() + _END_S
        while (alive := self._alive()) and time.monotonic() < deadline_s:
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(_LOOK_S)

    def _alive(self) -> list[psutil.Process]:
        return [process for process in _below() if process not in self._before and _is_alive(process)]


def _below() -> list[psutil.Process]:
    return list(psutil.Process().children(recursive=True))


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
