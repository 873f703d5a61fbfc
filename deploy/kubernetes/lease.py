"""Which of several autoscalers acts: a Lease, held as client-go's leader election holds it.

Deadlines are counted by this process's own monotonic clock, from when it last saw the record change. The times in the
record are for people: clocks of hosts are never compared. Two holders are possible only while a process is stopped and
does not know it (a paused machine), so `is_held` is to be asked right before each act.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from deploy.kubernetes.client import LEASES, ApiRefused, Json, KubernetesApi, KubernetesError

_HELD_SHARE = 2 / 3
_NOT_FOUND = 404
_CONFLICT = 409


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """What the Lease says."""

    holder: str
    """Empty when nobody holds it."""
    duration_s: float
    num_transitions: int
    acquired_at: str
    renewed_at: str


class LeaseHolder:
    """A contender for one Lease. `hold` is called every few seconds, `release` at the end (on SIGTERM).

    `identity` must be this process's alone, so more than the pod's name: a restarted container has the same one.
    """

    def __init__(
        self,
        api: KubernetesApi,
        namespace: str,
        name: str,
        identity: str,
        duration_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if duration_s < 1 or not identity:
            raise ValueError("a Lease needs an identity, and a duration of at least 1 s")
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._duration_s = duration_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._record: LeaseRecord | None = None
        self._seen_at_s = 0.0
        self._held_until_s = float("-inf")
        self.problem = ""
        """Why the last try failed; empty also when another holds the Lease, which is no failure."""

    @property
    def is_held(self) -> bool:
        """Whether this process may act now. Ends a third of the duration before another could take the Lease."""
        return self._clock() < self._held_until_s

    @property
    def record(self) -> LeaseRecord | None:
        """The Lease as it was last seen."""
        return self._record

    @property
    def retry_s(self) -> float:
        """How often `hold` is to be called: three times before a holder gives up."""
        return self._duration_s * _HELD_SHARE / 4

    def hold(self) -> bool:
        """One try to acquire or renew, and whether it did. After one that did not, `is_held` may still be true."""
        try:
            held = self._try()
        except KubernetesError as error:
            self.problem = str(error)
            return False
        self.problem = ""
        return held

    def release(self) -> None:
        """Lets another take the Lease at once, if it names this process. Never raises."""
        self._held_until_s = float("-inf")
        if self._record is None or self._record.holder != self._identity:
            return
        try:
            item = self._api.get(LEASES, self._namespace, self._name)
            record = self._see(item)
            if record.holder == self._identity:
                # The server wants a duration above zero.
                self._see(self._put(item, self._spec(None, 1, record.num_transitions, record.acquired_at)))
        except KubernetesError as error:
            self.problem = str(error)

    def _try(self) -> bool:
        for is_last in (False, True):
            started_s = self._clock()
            try:
                item = self._api.get(LEASES, self._namespace, self._name)
            except ApiRefused as error:
                if error.status != _NOT_FOUND:
                    raise
                item = None
            if item is not None and not self._may_take(self._see(item)):
                return False
            try:
                self._see(self._create() if item is None else self._renew(item))
            except ApiRefused as error:
                # Another wrote in between. What it wrote may be a label, or that it is the holder now.
                if error.status != _CONFLICT or is_last:
                    raise
            else:
                # From before the call: others count from when it arrived.
                self._held_until_s = started_s + self._duration_s * _HELD_SHARE
                return True
        raise AssertionError("unreachable")

    def _may_take(self, record: LeaseRecord) -> bool:
        if record.holder in ("", self._identity):
            return True
        self._held_until_s = float("-inf")  # another has it, whatever was believed here
        return self._clock() >= self._seen_at_s + record.duration_s

    def _see(self, item: Json) -> LeaseRecord:
        record = _parse(item, self._duration_s)
        if record != self._record:
            self._record, self._seen_at_s = record, self._clock()
        return record

    def _create(self) -> Json:
        spec = self._spec(self._identity, self._duration_s, 0)
        return self._api.create(LEASES, self._namespace, {"metadata": {"name": self._name}, "spec": spec})

    def _renew(self, item: Json) -> Json:
        before = _parse(item, self._duration_s)
        if before.holder == self._identity:
            return self._put(
                item, self._spec(self._identity, self._duration_s, before.num_transitions, before.acquired_at)
            )
        return self._put(item, self._spec(self._identity, self._duration_s, before.num_transitions + 1))

    def _put(self, item: Json, spec: Json) -> Json:
        # Labels and other fields of the object stay as they were read; with them goes the version that was read.
        return self._api.replace(LEASES, self._namespace, {**item, "spec": {**(item.get("spec") or {}), **spec}})

    def _spec(self, holder: str | None, duration_s: float, num_transitions: int, acquired_at: str = "") -> Json:
        now = micro_time(self._wall_clock())
        return {
            "holderIdentity": holder,
            "leaseDurationSeconds": max(1, round(duration_s)),
            "acquireTime": acquired_at or now,
            "renewTime": now,
            "leaseTransitions": num_transitions,
        }


def micro_time(wall_s: float) -> str:
    """A time as the API takes it: with six digits, which isoformat() leaves out of a whole second."""
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _parse(item: Json, duration_s: float) -> LeaseRecord:
    spec = item.get("spec") or {}
    return LeaseRecord(
        holder=spec.get("holderIdentity") or "",
        duration_s=float(spec.get("leaseDurationSeconds") or duration_s),
        num_transitions=spec.get("leaseTransitions") or 0,
        acquired_at=spec.get("acquireTime") or "",
        renewed_at=spec.get("renewTime") or "",
    )
