"""Where a request goes: the cheapest placement, every cost in milliseconds.

The unit is time lost by anybody. A placement costs what the request itself waits (queue, prefill, KV transfer, decode)
and what it takes from the streams that already run there (a prefill chunk stalls them, one more sequence slows their
steps). So a placement is dear on a busy worker and cheap where its prefix is cached, with no weights to tune.

Pure: views in, Placement or Reject out. Knows nothing of connections, tokens or where the views come from.
"""

from __future__ import annotations

import dataclasses
import enum
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# max_tokens is an upper bound that few completions reach: expect no more output than this when weighing decode workers.
EXPECTED_OUTPUT_TOKENS = 128
# One more sequence in the batch makes a decode step this much longer, relative to the step observed.
STEP_SHARE = 0.02
# A decode worker computes the rest of a prompt itself when it holds all but so few tokens: a KV transfer costs more.
# A prompt that no worker has seen goes to the prefill pool, however short.
MAX_LOCAL_PREFILL_TOKENS = 32


class Role(enum.Enum):
    """What kind of requests a worker takes."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a worker of a pool is, as observed."""

    prefill_ms_per_token: float
    decode_ms_per_step: float
    transfer_ms_per_block: float


@dataclass(frozen=True, slots=True)
class AdapterNeed:
    """The adapter of a request."""

    digest: bytes
    is_loadable: bool  # a worker that does not hold it can read it; else the files at its path have another digest


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What the policy needs to know of a request."""

    request_id: str
    num_prompt_tokens: int  # to be in the KV cache before the next token: the prompt, and what was emitted before
    num_output_tokens: int  # most tokens still to come
    avoid: frozenset[str] = frozenset()  # workers that just failed it: taken only when there is no other
    adapter: AdapterNeed | None = None


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the router sees it now, its own reservations included."""

    worker_id: str
    role: Role
    kv_fingerprint: bytes  # workers exchange KV blocks only when it is the same
    block_size: int
    num_blocks: int
    num_free_blocks: int  # free or only cached
    num_streams: int  # running and waiting
    num_queued_tokens: int  # prompt tokens accepted and not yet computed
    num_cached_tokens: int  # of this request's prompt, probably held by this worker
    num_stored_tokens: int  # of this request's prompt, probably in the KV tiers
    rates: Rates
    takes_adapters: bool = False
    holds_adapter: bool = False  # this request's, on its device or in its host's memory
    adapter_ms: float = 0.0  # until this request's adapter is on its device


@dataclass(frozen=True, slots=True)
class CostTerms:
    """What a placement costs, in milliseconds of anybody's time."""

    queue_ms: float = 0.0  # prompt tokens ahead of this one
    prefill_ms: float = 0.0  # the uncached part of this prompt
    stall_ms: float = 0.0  # that prefill, for the streams that decode on the same worker
    transfer_ms: float = 0.0  # KV blocks to be pulled, by either worker
    decode_ms: float = 0.0  # the expected output, for this stream and for those beside it
    memory_ms: float = 0.0  # until enough KV blocks are free
    adapter_ms: float = 0.0  # until the adapter is on the device

    @property
    def total_ms(self) -> float:
        """All of it."""
        return self.ttft_ms + self.stall_ms + self.decode_ms

    @property
    def ttft_ms(self) -> float:
        """The part that the client waits for before its first token: a prediction that can be checked."""
        return self.queue_ms + self.prefill_ms + self.transfer_ms + self.memory_ms + self.adapter_ms

    def __add__(self, other: CostTerms) -> CostTerms:
        return CostTerms(
            self.queue_ms + other.queue_ms,
            self.prefill_ms + other.prefill_ms,
            self.stall_ms + other.stall_ms,
            self.transfer_ms + other.transfer_ms,
            self.decode_ms + other.decode_ms,
            self.memory_ms + other.memory_ms,
            self.adapter_ms + other.adapter_ms,
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """Who prefills and who decodes."""

    prefill_id: str | None  # None: the decode worker takes the whole request
    decode_id: str
    num_uncached_tokens: int  # prompt tokens that the prefilling worker will probably compute
    cost: CostTerms


class RejectReason(enum.Enum):
    """Why no worker can take a request."""

    NO_WORKER = "no_worker"  # no suitable worker is up: waiting may help
    TOO_LARGE = "too_large"  # it does not fit the KV cache of any worker: waiting will not help


@dataclass(frozen=True, slots=True)
class Reject:
    """No placement."""

    reason: RejectReason
    message: str


RoutingPolicy = Callable[[RouteRequest, Sequence[WorkerView]], Placement | Reject]


def cheapest(request: RouteRequest, workers: Sequence[WorkerView]) -> Placement | Reject:
    """Least milliseconds: load, prefix affinity, KV transfer and memory together."""
    fitting = [view for view in workers if _fits(request, view)]
    placement = _best(request, [view for view in fitting if view.worker_id not in request.avoid])
    if placement is None and request.avoid:
        placement = _best(request, fitting)
    return placement or _reject(request, workers)


def least_loaded(request: RouteRequest, workers: Sequence[WorkerView]) -> Placement | Reject:
    """As cheapest, but blind to prefixes: the yardstick for what affinity is worth."""
    blind = [dataclasses.replace(view, num_cached_tokens=0, num_stored_tokens=0) for view in workers]
    return cheapest(request, blind)


POLICIES: dict[str, RoutingPolicy] = {"cheapest": cheapest, "least_loaded": least_loaded}


def num_blocks_needed(num_tokens: int, block_size: int) -> int:
    """KV blocks that hold so many tokens."""
    return -(-num_tokens // block_size)


def _best(request: RouteRequest, workers: Sequence[WorkerView]) -> Placement | None:
    whole = [view for view in workers if view.role is Role.MIXED]
    options: list[tuple[_Key, Placement]] = []
    decoders = [view for view in workers if view.role is Role.DECODE]
    for fingerprint in dict.fromkeys(view.kv_fingerprint for view in decoders):
        group = [view for view in decoders if view.kv_fingerprint == fingerprint]
        prefillers = [view for view in workers if view.role is Role.PREFILL and view.kv_fingerprint == fingerprint]
        if not prefillers:
            whole += group  # a decode worker without prefill workers takes whole requests
            continue
        whole += [view for view in group if _is_nearly_cached(request, view)]
        # The two halves do not depend on each other, so P + D candidates are weighed, not P x D.
        prefiller, prefill_cost, prefill_key = _cheapest_of(request, prefillers, _prefill_cost)
        decoder, decode_cost, decode_key = _cheapest_of(request, group, _decode_cost)
        cost = prefill_cost + decode_cost
        key = (round(cost.total_ms, 3), prefill_key[1] + decode_key[1], decode_key[2])
        options.append((key, Placement(prefiller.worker_id, decoder.worker_id, _uncached(request, prefiller), cost)))
    if whole:
        worker, cost, key = _cheapest_of(request, whole, _whole_cost)
        options.append((key, Placement(None, worker.worker_id, _uncached(request, worker), cost)))
    return min(options, key=lambda option: option[0])[1] if options else None


_Key = tuple[float, int, int]  # cost, then streams, then a tie-break that is fixed for a request and a worker


def _cheapest_of(
    request: RouteRequest, views: Sequence[WorkerView], weigh: Callable[[RouteRequest, WorkerView], CostTerms]
) -> tuple[WorkerView, CostTerms, _Key]:
    weighed = ((view, weigh(request, view)) for view in views)
    keyed = ((view, cost, (round(cost.total_ms, 3), view.num_streams, _tie(request, view))) for view, cost in weighed)
    return min(keyed, key=lambda entry: entry[2])


def _tie(request: RouteRequest, view: WorkerView) -> int:
    # Equal workers share equal requests, whatever their order in the directory; repeatable for a given request.
    return zlib.crc32(f"{request.request_id}/{view.worker_id}".encode())


def _fits(request: RouteRequest, view: WorkerView) -> bool:
    # The next token needs a slot too; prefill workers hold the prompt only.
    num_tokens = request.num_prompt_tokens + (0 if view.role is Role.PREFILL else 1)
    return num_blocks_needed(num_tokens, view.block_size) <= view.num_blocks


def _uncached(request: RouteRequest, view: WorkerView) -> int:
    # At least one token is always computed: the logits of the last one choose the next.
    return max(1, request.num_prompt_tokens - view.num_cached_tokens - _num_fetched_tokens(request, view))


def _num_fetched_tokens(request: RouteRequest, view: WorkerView) -> int:
    """Prompt tokens that the worker pulls from the tiers, because that is cheaper than to compute them."""
    pays = view.rates.transfer_ms_per_block < view.block_size * view.rates.prefill_ms_per_token
    return max(0, view.num_stored_tokens - view.num_cached_tokens) if pays else 0


def _is_nearly_cached(request: RouteRequest, view: WorkerView) -> bool:
    has_any = max(view.num_cached_tokens, view.num_stored_tokens) > 0
    return has_any and _uncached(request, view) <= MAX_LOCAL_PREFILL_TOKENS


def _prefill_cost(request: RouteRequest, view: WorkerView) -> CostTerms:
    num_fetched_blocks = _num_fetched_tokens(request, view) // view.block_size
    return CostTerms(
        queue_ms=view.num_queued_tokens * view.rates.prefill_ms_per_token,
        prefill_ms=_uncached(request, view) * view.rates.prefill_ms_per_token,
        transfer_ms=num_fetched_blocks * view.rates.transfer_ms_per_block,
        memory_ms=_memory_ms(view, num_blocks_needed(request.num_prompt_tokens, view.block_size)),
        adapter_ms=view.adapter_ms,
    )


def _decode_cost(request: RouteRequest, view: WorkerView) -> CostTerms:
    num_output_tokens = min(request.num_output_tokens, EXPECTED_OUTPUT_TOKENS)
    num_blocks = num_blocks_needed(request.num_prompt_tokens + num_output_tokens, view.block_size)
    num_held = view.num_cached_tokens // view.block_size
    # Each of the n streams already there loses as much per step as this one adds, so the share counts twice.
    slowdown = 1 + 2 * STEP_SHARE * view.num_streams
    return CostTerms(
        transfer_ms=(num_blocks_needed(request.num_prompt_tokens, view.block_size) - num_held)
        * view.rates.transfer_ms_per_block,
        decode_ms=num_output_tokens * view.rates.decode_ms_per_step * slowdown,
        memory_ms=_memory_ms(view, num_blocks),
        adapter_ms=view.adapter_ms,
    )


def _whole_cost(request: RouteRequest, view: WorkerView) -> CostTerms:
    prefill = _prefill_cost(request, view)
    decode = _decode_cost(request, view)
    return CostTerms(
        queue_ms=prefill.queue_ms,
        prefill_ms=prefill.prefill_ms,
        transfer_ms=prefill.transfer_ms,
        stall_ms=prefill.prefill_ms * view.num_streams,
        decode_ms=decode.decode_ms,
        memory_ms=decode.memory_ms,
        adapter_ms=view.adapter_ms,
    )


def _memory_ms(view: WorkerView, num_blocks: int) -> float:
    num_missing = min(num_blocks, view.num_blocks) - view.num_free_blocks
    if num_missing <= 0:
        return 0.0
    # Blocks come free when streams end; n streams together use up a block every block_size / n steps.
    return num_missing * view.block_size * view.rates.decode_ms_per_step / max(1, view.num_streams)


def _reject(request: RouteRequest, workers: Sequence[WorkerView]) -> Reject:
    deciding = [view for view in workers if view.role is not Role.PREFILL]
    if not deciding:
        kinds = "only prefill workers are up" if workers else "no worker is up"
        return Reject(RejectReason.NO_WORKER, f"{kinds}; a request needs a decode or a mixed worker")
    largest = max(view.num_blocks * view.block_size for view in deciding)
    message = f"{request.num_prompt_tokens} prompt tokens do not fit a worker's KV cache of {largest} tokens"
    return Reject(RejectReason.TOO_LARGE, message)
