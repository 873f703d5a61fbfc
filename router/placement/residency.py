"""Where the requests of an adapter go: to few workers, always the same ones, and to more of them only under load.

An adapter has k homes: the first k workers in an order that is a hash of the adapter's digest and the worker's id
(rendezvous hashing). All routers find the same homes without a word between them, a worker that comes or goes moves
only the adapters that it is a home of, and hundreds of adapters spread over all workers. Among the homes the policy
decides, by milliseconds as for any request; reading an adapter and copying it to the device are milliseconds, too.

k grows by one when another worker would be cheaper although it had to read the adapter first, and although others must
be read again that go out of its memory for it (EVICTION_READS). k shrinks by one for each time of COOL_S in which that
did not happen. So an adapter in demand is on as many workers as pay, and one that few ask
for is in one place and not in everybody's memory.

Pure: views and times in, a placement out. Knows nothing of how workers keep adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from router.placement.policy import (
    AdapterNeed,
    Placement,
    Reject,
    RejectReason,
    Role,
    RouteRequest,
    RoutingPolicy,
    WorkerView,
)

COOL_S = 60.0
# Reads that a read at a new home causes later: of the adapter that it takes the place of, and of itself, once its place
# is taken. Without them adapters chase each other through all workers (`python -m bench.adapters.placement`).
EVICTION_READS = 2


@dataclass(frozen=True, slots=True)
class AdapterCosts:
    """First guesses of what it takes until an adapter is on a device, in milliseconds."""

    load_ms: float
    """From its files."""
    copy_ms: float
    """From the host's memory."""


@dataclass(frozen=True, slots=True)
class HeldAdapters:
    """Digests of the adapters that a worker holds, as it said."""

    num_slots: int = 0  # on the device; 0: it takes no adapters
    on_device: frozenset[bytes] = frozenset()
    on_host: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Homes:
    """How many homes an adapter has, and since when that was not found to be too few."""

    count: int = 1
    since_s: float = 0.0


def by_rendezvous(digest: bytes, worker_ids: Iterable[str]) -> list[str]:
    """The workers in the order in which they become homes of an adapter."""

    def score(worker_id: str) -> bytes:
        return hashlib.blake2b(worker_id.encode(), digest_size=8, key=digest[:64], person=b"switchyard-home").digest()

    return sorted(worker_ids, key=lambda worker_id: (score(worker_id), worker_id))


def cooled(homes: Homes, now_s: float) -> Homes:
    """After a time in which they were enough."""
    num_steps = int(max(0.0, now_s - homes.since_s) // COOL_S)
    if num_steps == 0:
        return homes
    return Homes(max(1, homes.count - num_steps), homes.since_s + num_steps * COOL_S)


def at_home(digest: bytes, views: Sequence[WorkerView], num_homes: int) -> list[WorkerView]:
    """The homes among the workers: so many of each role, and of each kind of KV blocks, since both halves of a request
    need the adapter and exchange blocks."""
    groups: dict[tuple[Role, bytes], list[WorkerView]] = {}
    for view in views:
        groups.setdefault((view.role, view.kv_fingerprint), []).append(view)
    homes: set[str] = set()
    for group in groups.values():
        homes.update(by_rendezvous(digest, (view.worker_id for view in group))[:num_homes])
    return [view for view in views if view.worker_id in homes]


def place(
    request: RouteRequest, views: Sequence[WorkerView], policy: RoutingPolicy, homes: Homes, now_s: float
) -> tuple[Placement | Reject, Homes]:
    """Where a request with an adapter goes, and how many homes the adapter has from now on."""
    need = request.adapter
    assert need is not None, "asked where the adapter of a request without one is"
    able = [view for view in views if view.takes_adapters and (need.is_loadable or view.holds_adapter)]
    if not able:
        return _reject(need, views), homes
    homes = cooled(homes, now_s)
    # Workers that failed the request are no homes of it, so that it finds others.
    wanted = [view for view in able if view.worker_id not in request.avoid] or able
    anywhere = policy(request, wanted)
    if isinstance(anywhere, Reject):
        return policy(request, able), homes
    found = policy(request, at_home(need.digest, wanted, homes.count))
    price_ms = anywhere.cost.total_ms + EVICTION_READS * anywhere.cost.adapter_ms
    if isinstance(found, Placement) and found.cost.total_ms <= price_ms:
        return found, homes
    if homes.count < _most_homes(wanted):
        homes = Homes(homes.count + 1, now_s)
        found = policy(request, at_home(need.digest, wanted, homes.count))
    return (found if isinstance(found, Placement) else anywhere), homes


def adapter_ms(digest: bytes, held: HeldAdapters, is_coming: bool, costs: AdapterCosts) -> float:
    """Until the adapter is on the worker's device. is_coming: other requests of this router brought it there."""
    if is_coming or digest in held.on_device:
        return 0.0
    return costs.copy_ms if digest in held.on_host else costs.load_ms


def _most_homes(views: Sequence[WorkerView]) -> int:
    counts: dict[tuple[Role, bytes], int] = {}
    for view in views:
        key = (view.role, view.kv_fingerprint)
        counts[key] = counts.get(key, 0) + 1
    return max(counts.values())


def _reject(need: AdapterNeed, views: Sequence[WorkerView]) -> Reject:
    if not any(view.takes_adapters for view in views):
        return Reject(RejectReason.NO_WORKER, "no worker that takes adapters is up")
    message = f"no worker holds adapter {need.digest.hex()[:16]}, and the files at its path have another digest"
    return Reject(RejectReason.NO_WORKER, message)
