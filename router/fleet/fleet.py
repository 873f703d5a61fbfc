"""The router's view of its workers: which are up, their load, the blocks they hold, and the speed of their pools.

pick() chooses and reserves in one step, so a burst of requests spreads before any worker has reported its load. What a
view shows is the worker's last report plus what this router did since; other routers' work comes in with the reports.
Pure: the clock is the caller's. Knows nothing of connections or of the streams that the reservations stand for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvstore.names import block_names, root_name
from router.placement.affinity import BlockEvent, HeldBlocks, SeenBlocks
from router.placement.policy import (
    EXPECTED_OUTPUT_TOKENS,
    Placement,
    Rates,
    Reject,
    Role,
    RouteRequest,
    RoutingPolicy,
    WorkerView,
    num_blocks_needed,
)
from router.placement.residency import AdapterCosts, HeldAdapters, Homes, adapter_ms, at_home, place

_SMOOTHING = 0.1  # weight of the newest observation of a pool's speed
_MIN_OBSERVED_TOKENS = 32  # shorter prefills measure overhead, not speed
_MIN_OBSERVED_STEPS = 8
_MAX_STORED_BLOCKS = 1 << 16  # names kept of what the tiers probably hold


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What makes two workers' block names comparable."""

    fingerprint: bytes
    block_size: int


BlockNames = Mapping[KvLayout, Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What does not change in the life of a worker's process."""

    worker_id: str
    pool: str
    role: Role
    kv: KvLayout
    num_blocks: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a worker last said of itself."""

    num_streams: int
    num_free_blocks: int
    num_queued_tokens: int
    adapters: HeldAdapters = field(default_factory=HeldAdapters)


@dataclass(slots=True)
class _Reserved:
    """Sums over this router's live reservations on one worker."""

    num_streams: int = 0
    num_tokens: int = 0  # prompt tokens not known to be computed yet
    num_blocks: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    info: WorkerInfo
    report: LoadReport
    held: HeldBlocks
    now: _Reserved
    at_report: _Reserved
    is_retired: bool = False  # takes nothing new; its streams run on
    adapters: Counter[bytes] = field(default_factory=Counter)  # digests of this router's live reservations there


@dataclass(frozen=True, slots=True)
class _Share:
    """One worker's part of a reservation."""

    worker_id: str
    num_tokens: int
    num_blocks: int
    sent: Sequence[bytes] = ()  # blocks that count as the worker's because this stream brought them


@dataclass(slots=True, eq=False)
class _Reservation:
    placement: Placement
    shares: dict[str, _Share]
    placed_s: float
    num_tokens_ahead: int  # to be computed before the first token, its own included
    names: BlockNames  # of the prompt
    adapter: bytes  # its digest; empty: none


class Fleet:
    """Workers, reservations and memory of one router."""

    def __init__(self, policy: RoutingPolicy, first_rates: Rates, adapter_costs: AdapterCosts) -> None:
        self._policy = policy
        self._adapter_costs = adapter_costs
        self._homes: dict[bytes, Homes] = {}  # by digest; an adapter with one home is not in it
        # Per pool, for its workers are alike: a worker that had one slow request would otherwise look slow for good,
        # since it gets no work that could show the contrary. One that is slow for good shows in its queue.
        self._first_rates = first_rates
        self._rates: dict[str, Rates] = {}
        self._workers: dict[str, _Worker] = {}
        self._reservations: dict[str, _Reservation] = {}
        # What workers compute they publish, and the tiers outlive them.
        self._stored: dict[KvLayout, SeenBlocks] = {}

    # -- workers

    def add(self, info: WorkerInfo) -> None:
        """A worker is connected. Its memory starts empty, for its caches do."""
        report = LoadReport(num_streams=0, num_free_blocks=info.num_blocks, num_queued_tokens=0)
        held = HeldBlocks(info.num_blocks)
        self._workers[info.worker_id] = _Worker(info, report, held, _Reserved(), _Reserved())

    def remove(self, worker_id: str) -> None:
        """A worker is gone. What was reserved on it is forgotten; releasing it later does no harm."""
        self._workers.pop(worker_id, None)
        for reservation in self._reservations.values():
            reservation.shares.pop(worker_id, None)

    def retire(self, worker_id: str, is_retired: bool) -> None:
        """A worker gave up its lease (or has it again): it gets no new requests."""
        if worker_id in self._workers:
            self._workers[worker_id].is_retired = is_retired

    def report(self, worker_id: str, report: LoadReport) -> None:
        """A worker said how loaded it is."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.report = report
            worker.at_report = replace(worker.now)

    def apply_block_event(self, worker_id: str, event: BlockEvent) -> bool:
        """A worker reported its blocks. False: an event is missing, so the caller must ask for a snapshot."""
        worker = self._workers.get(worker_id)
        return worker is not None and worker.held.apply(event)

    def lose_blocks(self, worker_id: str) -> None:
        """A worker sends no more block events: the router guesses from what it sent there."""
        if worker_id in self._workers:
            self._workers[worker_id].held.lose_track()

    def num_reported_blocks(self, worker_id: str) -> int | None:
        """How many blocks a worker reported; None when it sends no block events."""
        worker = self._workers.get(worker_id)
        return None if worker is None else worker.held.num_reported

    @property
    def workers(self) -> list[WorkerInfo]:
        """Those that may get new requests."""
        return [worker.info for worker in self._workers.values() if not worker.is_retired]

    @property
    def can_serve(self) -> bool:
        """Whether a request would find a placement at all."""
        return any(info.role is not Role.PREFILL for info in self.workers)

    @property
    def context_tokens(self) -> int | None:
        """Longest stream that every worker takes; None while there is none."""
        return min((info.context_tokens for info in self.workers), default=None)

    @property
    def layouts(self) -> frozenset[KvLayout]:
        """The layouts that block names are wanted for."""
        return frozenset(info.kv for info in self.workers)

    def views(self, names: BlockNames, adapter: bytes = b"") -> list[WorkerView]:
        """The workers as a policy sees them, for a prompt with these block names and an adapter of this digest."""
        found = []
        for worker in self._workers.values():
            if not worker.is_retired:
                stored = self._num_stored_blocks(worker.info.kv, names)
                view = _view(worker, names, self._rates_of(worker), stored)
                found.append(_with_adapter(view, worker, adapter, self._adapter_costs) if adapter else view)
        return found

    def homes(self, adapter: bytes) -> list[str]:
        """The workers that the requests of an adapter go to, as of its last request."""
        able = [view for view in self.views({}, adapter) if view.takes_adapters]
        return [view.worker_id for view in at_home(adapter, able, self._homes.get(adapter, Homes()).count)]

    # -- reservations

    def pick(self, request: RouteRequest, names: BlockNames, now_s: float) -> Placement | Reject:
        """Choose a placement and reserve it, in one step. Ends with release(request.request_id)."""
        assert request.request_id not in self._reservations, "picked twice without a release"
        digest = b"" if request.adapter is None else request.adapter.digest
        views = {view.worker_id: view for view in self.views(names, digest)}
        placement = self._choose(request, list(views.values()), now_s)
        if isinstance(placement, Reject):
            return placement
        first = views[placement.prefill_id or placement.decode_id]
        shares = self._shares(request, placement)
        for worker_id, share in shares.items():
            worker = self._workers[worker_id]
            worker.now.num_streams += 1
            worker.now.num_tokens += share.num_tokens
            worker.now.num_blocks += share.num_blocks
            if digest:
                worker.adapters[digest] += 1
            shares[worker_id] = replace(share, sent=worker.held.send(names.get(worker.info.kv, ())))
        num_ahead = first.num_queued_tokens + placement.num_uncached_tokens
        self._reservations[request.request_id] = _Reservation(placement, shares, now_s, num_ahead, names, digest)
        return placement

    def _choose(self, request: RouteRequest, views: Sequence[WorkerView], now_s: float) -> Placement | Reject:
        if request.adapter is None:
            return self._policy(request, views)
        digest = request.adapter.digest
        found, homes = place(request, views, self._policy, self._homes.get(digest, Homes()), now_s)
        if homes.count > 1:
            self._homes[digest] = homes
        else:
            self._homes.pop(digest, None)
        return found

    def first_token(self, request_id: str, now_s: float) -> None:
        """The prompt is computed: the prefill worker is through with it, and showed how fast its pool is."""
        reservation = self._reservations.get(request_id)
        if reservation is None:
            return
        self.stored(reservation.names)
        placement = reservation.placement
        prefiller = placement.prefill_id or placement.decode_id
        worker = self._workers.get(prefiller)
        if worker is not None and reservation.num_tokens_ahead >= _MIN_OBSERVED_TOKENS:
            sample = (now_s - reservation.placed_s) * 1000 / reservation.num_tokens_ahead
            old = self._rates_of(worker)
            self._rates[worker.info.pool] = replace(old, prefill_ms_per_token=_smooth(old.prefill_ms_per_token, sample))
        share = reservation.shares.get(prefiller)
        if share is None:
            return
        if placement.prefill_id is not None:
            self._give_back(reservation, prefiller)
        elif worker is not None:
            worker.now.num_tokens -= share.num_tokens
            reservation.shares[prefiller] = replace(share, num_tokens=0)

    def release(self, request_id: str) -> None:
        """The stream ended or lost its placement. Unknown ids are ignored: releasing twice does no harm."""
        reservation = self._reservations.pop(request_id, None)
        if reservation is not None:
            for worker_id in list(reservation.shares):
                self._give_back(reservation, worker_id)

    def observe_decode(self, worker_id: str, num_steps: int, duration_s: float) -> None:
        """A stream that was never held back by its client took so long for so many decode steps."""
        worker = self._workers.get(worker_id)
        if worker is not None and num_steps >= _MIN_OBSERVED_STEPS:
            old = self._rates_of(worker)
            sample = duration_s * 1000 / num_steps
            self._rates[worker.info.pool] = replace(old, decode_ms_per_step=_smooth(old.decode_ms_per_step, sample))

    def remember(self, worker_id: str, names: BlockNames) -> None:
        """A worker holds these blocks now: the output of a stream, which the next turn of a chat will send back."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.held.remember(names.get(worker.info.kv, ()))
        self.stored(names)

    def stored(self, names: BlockNames) -> None:
        """The tiers hold these blocks now, whatever becomes of the worker that computed them."""
        for layout, known in names.items():
            self._stored.setdefault(layout, SeenBlocks(_MAX_STORED_BLOCKS)).remember(known)

    def _num_stored_blocks(self, layout: KvLayout, names: BlockNames) -> int:
        stored = self._stored.get(layout)
        return 0 if stored is None else stored.match_prefix(names.get(layout, ()))

    def _rates_of(self, worker: _Worker) -> Rates:
        return self._rates.get(worker.info.pool, self._first_rates)

    def _shares(self, request: RouteRequest, placement: Placement) -> dict[str, _Share]:
        num_output_tokens = min(request.num_output_tokens, EXPECTED_OUTPUT_TOKENS)
        num_tokens = {placement.decode_id: request.num_prompt_tokens + num_output_tokens}
        if placement.prefill_id is not None:
            num_tokens[placement.prefill_id] = request.num_prompt_tokens
        prefiller = placement.prefill_id or placement.decode_id
        return {
            worker_id: _Share(
                worker_id,
                num_tokens=placement.num_uncached_tokens if worker_id == prefiller else 0,
                num_blocks=num_blocks_needed(tokens, self._workers[worker_id].info.kv.block_size),
            )
            for worker_id, tokens in num_tokens.items()
        }

    def _give_back(self, reservation: _Reservation, worker_id: str) -> None:
        share = reservation.shares.pop(worker_id)
        worker = self._workers[worker_id]
        worker.held.let_go(share.sent)
        reserved = worker.now
        reserved.num_streams -= 1
        reserved.num_tokens -= share.num_tokens
        reserved.num_blocks -= share.num_blocks
        if reservation.adapter:
            worker.adapters[reservation.adapter] -= 1
            worker.adapters += Counter()  # drops what is 0

    def check(self) -> None:
        """Derive the sums anew from the reservations and compare: for tests and for idle moments."""
        for worker_id, worker in self._workers.items():
            shares = [r.shares[worker_id] for r in self._reservations.values() if worker_id in r.shares]
            derived = _Reserved(
                len(shares), sum(share.num_tokens for share in shares), sum(share.num_blocks for share in shares)
            )
            assert worker.now == derived, f"{worker_id}: books say {worker.now}, reservations say {derived}"
            mine = [r.adapter for r in self._reservations.values() if worker_id in r.shares and r.adapter]
            assert worker.adapters == Counter(mine), f"{worker_id}: adapters {worker.adapters}, reservations {mine}"


def name_blocks(
    layouts: frozenset[KvLayout], token_ids: Sequence[int], tenant_salt: bytes, adapter: bytes = b""
) -> BlockNames:
    """Names of a prompt's full blocks under each layout. Worth a thread when the prompt is long.

    adapter: digest of the adapter that computes them.
    """
    names: dict[KvLayout, Sequence[bytes]] = {}
    for layout in layouts:
        root = root_name(layout.fingerprint, tenant_salt, adapter)
        names[layout] = block_names(root, token_ids, layout.block_size, with_tail=False)
    return names


def extend_names(names: BlockNames, token_ids: Sequence[int], tenant_salt: bytes, adapter: bytes = b"") -> BlockNames:
    """The names of a longer prompt, given those of its beginning: only the new blocks are hashed."""
    longer: dict[KvLayout, Sequence[bytes]] = {}
    for layout, known in names.items():
        if not known:
            longer |= name_blocks(frozenset((layout,)), token_ids, tenant_salt, adapter)
            continue
        rest = token_ids[len(known) * layout.block_size :]
        longer[layout] = [*known, *block_names(known[-1], rest, layout.block_size, with_tail=False)]
    return longer


def _view(worker: _Worker, names: BlockNames, rates: Rates, num_stored_blocks: int) -> WorkerView:
    info, report, now, then = worker.info, worker.report, worker.now, worker.at_report
    # The report covers what was here when it was made, everybody's. Since then only our own changes are known. It may
    # lag behind what we sent just before it, hence the floor (or ceiling) of our own sums.
    return WorkerView(
        worker_id=info.worker_id,
        role=info.role,
        kv_fingerprint=info.kv.fingerprint,
        block_size=info.kv.block_size,
        num_blocks=info.num_blocks,
        num_free_blocks=max(
            0, min(info.num_blocks - now.num_blocks, report.num_free_blocks - (now.num_blocks - then.num_blocks))
        ),
        num_streams=max(now.num_streams, report.num_streams + now.num_streams - then.num_streams),
        num_queued_tokens=max(now.num_tokens, report.num_queued_tokens + now.num_tokens - then.num_tokens),
        num_cached_tokens=worker.held.match_prefix(names.get(info.kv, ())) * info.kv.block_size,
        num_stored_tokens=num_stored_blocks * info.kv.block_size,
        rates=rates,
    )


def _with_adapter(view: WorkerView, worker: _Worker, digest: bytes, costs: AdapterCosts) -> WorkerView:
    held, is_coming = worker.report.adapters, worker.adapters[digest] > 0
    return replace(
        view,
        takes_adapters=held.num_slots > 0,
        holds_adapter=digest in held.on_device or digest in held.on_host,
        adapter_ms=adapter_ms(digest, held, is_coming, costs),
    )


def _smooth(old: float, sample: float) -> float:
    return old + _SMOOTHING * (sample - old)
