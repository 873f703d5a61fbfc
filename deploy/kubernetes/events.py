"""Events that explain what the autoscaler does, where `kubectl describe` shows them.

The group events.k8s.io rather than core: it has the action and the series that are wanted here. What is said again
within ten minutes is counted, and the count is sent as one Event when the ten minutes are over. Counting it in the
first Event would show it sooner, but needs the right to patch every Event of the namespace.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from deploy.kubernetes.client import EVENTS, ApiRefused, ApiUnreachable, Json, KubernetesApi, KubernetesError, Resource
from deploy.kubernetes.lease import micro_time

SERIES_S = 600.0
MAX_NOTE_BYTES = 1024  # the server refuses more
_MAX_SERIES = 256
_RETRY_S = 60.0
_AWAY_S = 10.0
_FORBIDDEN = 403
_NOT_FOUND = 404
_CUT = "..."

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ObjectReference:
    """What Events are about. Without its uid they are kept, but `kubectl describe` does not find them."""

    resource: Resource
    name: str
    uid: str = ""


@dataclass(frozen=True, slots=True)
class Statement:
    """What an Event says. Two that are equal are one that is repeated, so a note should not count seconds."""

    reason: str
    """Why, as one word: PlanNotReached."""
    note: str
    action: str
    """What was done or tried, as one word: ScaleUp."""
    is_warning: bool = False

    def __post_init__(self) -> None:
        for word in (self.reason, self.action):
            if not (word.isascii() and word.isalpha() and len(word) <= 128):
                raise ValueError(f"not one word of at most 128 letters: {word!r}")


@dataclass(slots=True)
class _Series:
    started_s: float
    count: int = 0
    first_at: str = ""
    last_at: str = ""


class EventLog:
    """Sends Events about one object. A failure is kept in `problem` and logged once; nothing is raised.

    An Event that cannot be sent is lost. While the API is away it is asked once in ten seconds, so that whoever has
    much to say does not wait for a time-out each time. Of one thread.
    """

    def __init__(
        self,
        api: KubernetesApi,
        namespace: str,
        about: ObjectReference,
        reporter: str,
        instance: str,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`reporter` is the component, such as switchyard-autoscaler; `instance` is its pod."""
        self._api = api
        self._namespace = namespace
        self._about = about
        self._reporter = reporter
        self._instance = instance
        self._clock = clock
        self._wall_clock = wall_clock
        self._series: dict[Statement, _Series] = {}
        self._ask_uid = not about.uid
        self._uid_problem = ""
        self._away_until_s = float("-inf")
        self.problem = ""
        """Why the last Event could not be sent."""

    def emit(self, reason: str, note: str, action: str, is_warning: bool = False) -> bool:
        """Sends an Event, or counts it if the same was said within ten minutes. Whether it is not lost."""
        said = Statement(reason, _cut(note), action, is_warning)
        self.flush()
        now_s, now_at = self._clock(), micro_time(self._wall_clock())
        series = self._series.get(said)
        if series is not None:
            series.count += 1
            series.first_at = series.first_at or now_at
            series.last_at = now_at
            return True
        if not self._send(said, now_at):
            return False
        if len(self._series) >= _MAX_SERIES:
            oldest = next(iter(self._series))
            self._end(oldest)
            self._series.pop(oldest, None)
        self._series[said] = _Series(now_s)
        return True

    def flush(self) -> None:
        """Sends the counts whose ten minutes are over; to be called now and then, or the last count comes late."""
        over = [said for said, series in self._series.items() if self._clock() >= series.started_s + SERIES_S]
        for said in over:
            self._end(said)

    def close(self) -> None:
        """Sends all counts."""
        for said in list(self._series):
            self._end(said)

    def _end(self, said: Statement) -> None:
        series = self._series.pop(said)
        if not series.count:
            return
        if self._send(said, series.first_at, series):
            # It goes on being counted: an Event that is repeated for hours is sent once in ten minutes.
            self._series[said] = _Series(self._clock())
        else:
            series.started_s = self._clock() - SERIES_S + _RETRY_S
            self._series[said] = series

    def _send(self, said: Statement, at: str, series: _Series | None = None) -> bool:
        if self._clock() < self._away_until_s:
            return False
        try:
            self._find_uid()
            self._api.create(EVENTS, self._namespace, self._event(said, at, series))
        except KubernetesError as error:
            if not self.problem:
                _log.warning("events are not sent: %s", error)
            self.problem = str(error)
            if isinstance(error, ApiUnreachable):
                self._away_until_s = self._clock() + _AWAY_S
            return False
        if self.problem:
            _log.info("events are sent again")
        self.problem = ""
        return True

    def _find_uid(self) -> None:
        if not self._ask_uid:
            return
        try:
            found = self._api.get(self._about.resource, self._namespace, self._about.name)
        except ApiRefused as error:
            if error.status not in (_FORBIDDEN, _NOT_FOUND):
                raise
            if not self._uid_problem:
                _log.warning("events do not show under %s %s: %s", self._about.resource.kind, self._about.name, error)
            self._uid_problem = str(error)
            self._ask_uid = error.status == _NOT_FOUND  # it may be made later
        else:
            self._about = dataclasses.replace(self._about, uid=found["metadata"]["uid"])
            self._ask_uid = False

    def _event(self, said: Statement, at: str, series: _Series | None) -> Json:
        about = self._about
        regarding = {
            "apiVersion": about.resource.api_version,
            "kind": about.resource.kind,
            "namespace": self._namespace,
            "name": about.name,
            **({"uid": about.uid} if about.uid else {}),
        }
        repeated = series is not None and series.count > 1  # the server takes no series of one
        return {
            "metadata": {"name": f"{about.name}.{uuid.uuid4().hex[:16]}", "namespace": self._namespace},
            "eventTime": at,
            "reportingController": self._reporter,
            "reportingInstance": self._instance,
            "regarding": regarding,
            "reason": said.reason,
            "note": said.note,
            "action": said.action,
            "type": "Warning" if said.is_warning else "Normal",
            **({"series": {"count": series.count, "lastObservedTime": series.last_at}} if series and repeated else {}),
        }


def _cut(note: str) -> str:
    data = note.encode()
    if len(data) <= MAX_NOTE_BYTES:
        return note
    return data[: MAX_NOTE_BYTES - len(_CUT)].decode(errors="ignore") + _CUT
