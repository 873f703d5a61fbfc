"""What placement by residency is worth: requests with many adapters on a few workers, in virtual time.

    python -m bench.adapters.placement

The routers' code is the production code (`router.fleet.fleet.Fleet`, `router.placement`); a worker is a model of one:
slots on the device and in host memory, least recently used out first, a read or a copy before a request begins, steps
that take longer the more streams there are. Three routers send the requests, and know of the others' what workers
report. Ways: `homes` is what is served; `resident` sends each request where it is cheapest, with the adapter in the
cost and no homes; `blind` does not look at adapters.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.rows import Measurement, append_rows
from router.fleet.fleet import Fleet, KvLayout, LoadReport, WorkerInfo
from router.placement.policy import AdapterNeed, Placement, Rates, Reject, Role, RouteRequest, WorkerView, cheapest
from router.placement.residency import AdapterCosts, HeldAdapters, Homes, adapter_ms, place

RATES = Rates(prefill_ms_per_token=0.2, decode_ms_per_step=10.0, transfer_ms_per_block=0.5)
COSTS = AdapterCosts(load_ms=100.0, copy_ms=5.0)
NUM_WORKERS, NUM_SLOTS, NUM_HOST, NUM_ROUTERS = 8, 8, 24, 3
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
REPORT_S = 0.1
STEP_SHARE = 0.02  # as in router.placement.policy


@dataclass(eq=False)
class _Worker:
    """Slots, and who runs. Times in seconds of virtual time."""

    held: OrderedDict[bytes, bool] = field(default_factory=OrderedDict)  # least recent first; whether on the device
    users: dict[bytes, int] = field(default_factory=dict)
    num_streams: int = 0
    num_hits: int = 0
    num_loads: int = 0
    num_requests: int = 0

    def begin(self, digest: bytes) -> float:
        """A request comes; seconds until its adapter is on the device."""
        self.num_requests += 1
        self.num_streams += 1
        wait_ms = adapter_ms(digest, self.report(), False, COSTS)
        self.num_hits += wait_ms == 0
        self.num_loads += digest not in self.held
        self.held[digest] = True
        self.held.move_to_end(digest)
        self.users[digest] = self.users.get(digest, 0) + 1
        on_device = [one for one, is_there in self.held.items() if is_there]
        idle = [one for one in on_device if not self.users.get(one)]
        for victim in idle[: max(0, len(on_device) - NUM_SLOTS)]:
            self.held[victim] = False
        for victim in [one for one, is_there in self.held.items() if not is_there][: max(0, len(self.held) - NUM_HOST)]:
            del self.held[victim]
        # With more adapters in use than slots, somebody waits for a stream to end.
        excess = sum(1 for one in self.users.values() if one) - NUM_SLOTS
        return (wait_ms + max(0, excess) * OUTPUT_TOKENS * RATES.decode_ms_per_step / NUM_SLOTS) / 1e3

    def end(self, digest: bytes) -> None:
        """A request is through."""
        self.num_streams -= 1
        self.users[digest] -= 1

    def report(self) -> HeldAdapters:
        """As the worker says it."""
        on_device = frozenset(digest for digest, is_there in self.held.items() if is_there)
        return HeldAdapters(NUM_SLOTS, on_device, frozenset(self.held) - on_device)


class _Resident(Fleet):
    """Without homes."""

    def _choose(self, request: RouteRequest, views: Sequence[WorkerView], now_s: float) -> Placement | Reject:
        return place(request, views, cheapest, Homes(NUM_WORKERS, now_s), now_s)[0]


WAYS: dict[str, Callable[[], Fleet]] = {
    "homes": lambda: Fleet(cheapest, RATES, COSTS),
    "resident": lambda: _Resident(cheapest, RATES, COSTS),
    "blind": lambda: _Resident(cheapest, RATES, AdapterCosts(0.0, 0.0)),
}


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    hit_share: float  # requests whose adapter was on the device
    loads_per_request: float
    ttft_ms: Sequence[float]
    duration_ms: Sequence[float]
    max_share: float  # requests of the busiest worker, of all


def simulate(way: str, num_adapters: int, rate: float, num_requests: int, seed: int) -> Outcome:
    """Poisson arrivals at a rate per second; adapter i is asked for in proportion to 1 / (i + 1)."""
    draw = random.Random(seed)
    digests = [draw.randbytes(32) for _ in range(num_adapters)]
    weights = [1 / (i + 1) for i in range(num_adapters)]
    run = _Run(way, num_requests)
    time_s = 0.0
    for number in range(num_requests):
        time_s += draw.expovariate(rate)
        (digest,) = draw.choices(digests, weights)
        run.at(time_s, functools.partial(run.arrive, number, digest))
    run.at(0.0, run.report)
    run.to_the_end()
    workers = run.workers.values()
    return Outcome(
        sum(worker.num_hits for worker in workers) / num_requests,
        sum(worker.num_loads for worker in workers) / num_requests,
        run.ttft_ms,
        run.duration_ms,
        max(worker.num_requests for worker in workers) / num_requests,
    )


class _Run:
    """Events in virtual time: requests come and end, and workers report."""

    def __init__(self, way: str, num_requests: int) -> None:
        self.workers = {f"worker-{i}": _Worker() for i in range(NUM_WORKERS)}
        self.ttft_ms: list[float] = []
        self.duration_ms: list[float] = []
        self._num_requests = num_requests
        self._routers = [WAYS[way]() for _ in range(NUM_ROUTERS)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        for fleet, worker_id in itertools.product(self._routers, self.workers):
            fleet.add(WorkerInfo(worker_id, "mixed", Role.MIXED, KvLayout(b"", 16), 4096, 4096))

    def at(self, time_s: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), action))

    def to_the_end(self) -> None:
        while self._events:
            now_s, _, action = heapq.heappop(self._events)
            action(now_s)

    def report(self, now_s: float) -> None:
        for fleet, (worker_id, worker) in itertools.product(self._routers, self.workers.items()):
            fleet.report(worker_id, LoadReport(worker.num_streams, 4096, 0, worker.report()))
        if len(self.ttft_ms) < self._num_requests:
            self.at(now_s + REPORT_S, self.report)

    def arrive(self, number: int, digest: bytes, now_s: float) -> None:
        fleet = self._routers[number % NUM_ROUTERS]
        request = RouteRequest(str(number), PROMPT_TOKENS, OUTPUT_TOKENS, adapter=AdapterNeed(digest, True))
        found = fleet.pick(request, {}, now_s)
        assert isinstance(found, Placement), found
        worker = self.workers[found.decode_id]
        slower = 1 + STEP_SHARE * worker.num_streams
        first_s = worker.begin(digest) + PROMPT_TOKENS * RATES.prefill_ms_per_token * slower / 1e3
        last_s = first_s + OUTPUT_TOKENS * RATES.decode_ms_per_step * slower / 1e3
        self.ttft_ms.append(first_s * 1e3)
        self.duration_ms.append(last_s * 1e3)

        def end(_: float) -> None:
            worker.end(digest)
            fleet.release(str(number))

        self.at(now_s + last_s, end)


def main() -> None:
    """Print the table; --record appends it to bench/results/cpu.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[10.0, 40.0, 100.0], help="requests per second")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    print(f"{options.adapters} adapters, {NUM_WORKERS} workers of {NUM_SLOTS} slots (host memory: {NUM_HOST})")
    print("rate/s  way       on device  reads/request  TTFT mean, p99 ms  duration ms  busiest worker")
    rows = []
    for rate, way in itertools.product(options.rates, WAYS):
        runs = [simulate(way, options.adapters, rate, options.requests, seed) for seed in range(options.seeds)]
        print(_line(rate, way, runs))
        setting = {"way": way, "rate": rate, "adapters": options.adapters, "requests": options.requests}
        means = [statistics.mean(run.ttft_ms) / 1e3 for run in runs]
        rows.append(Measurement("adapter_placement.ttft", "s", means, setting))
        rows.append(Measurement("adapter_placement.on_device", "", [run.hit_share for run in runs], setting))
    if options.record:
        append_rows("cpu.jsonl", rows, "python -m bench.adapters.placement")


def _line(rate: float, way: str, runs: Sequence[Outcome]) -> str:
    hit, reads, most = (
        statistics.mean(getattr(run, name) for run in runs) for name in ("hit_share", "loads_per_request", "max_share")
    )
    all_ms = sorted(ms for run in runs for ms in run.ttft_ms)
    ttft_ms, p99 = statistics.mean(all_ms), all_ms[int(len(all_ms) * 0.99)]
    duration_ms = statistics.mean(ms for run in runs for ms in run.duration_ms)
    ends = f"{ttft_ms:8.1f} {p99:8.1f}  {duration_ms:11.1f}  {most:14.3f}"
    return f"{rate:6g}  {way:8s}  {hit:9.3f}  {reads:13.3f}  {ends}"


if __name__ == "__main__":
    main()
