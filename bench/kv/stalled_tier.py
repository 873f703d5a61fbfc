"""The longest gap between two tokens while a tier does not answer for two seconds.

A worker of its own decodes some streams, and computes prompts whose blocks others wait for; its only tier is a Redis
behind a proxy. In one run of each pair the proxy stops for two seconds, in the other it does not: what the gap grows by
is what the tier costs streams that do not need it.
"""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from switchyard.v1 import worker_pb2

from bench.direct import DirectWorker, Part, connect
from bench.rows import ROOT, Measurement
from kvstore.config import KVStoreConfig
from workers.config import EngineConfig, WorkerSpec

NUM_STREAMS, STALL_S, RUN_S = 4, 2.0, 3.0
_PROMPT_EVERY_S, _PROMPT_TOKENS = 0.25, 100
_TIER_RETURNS_S = 3.0  # a tier that did not answer is tried again after a while


class StallingProxy:
    """A TCP proxy to one server. While it is stalled, bytes stay in it and connections are not closed."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._flows = threading.Event()
        self._flows.set()
        self._server = socket.create_server(("127.0.0.1", 0))  # noqa: TID251 - accepts at loopback, for a benchmark
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Pass nothing on."""
        self._flows.clear()

    def resume(self) -> None:
        """Pass on what waits, and what comes."""
        self._flows.set()

    def close(self) -> None:
        """Take no more connections."""
        self._flows.set()
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(self._target)
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def _worker(tier: str, model_dir: Path) -> Iterator[DirectWorker]:
    engine = EngineConfig(str(model_dir), device="cpu", async_scheduling=True)
    kvstore = KVStoreConfig(tier=tier)
    spec = WorkerSpec("stalled-tier", "mixed", "mixed", engine, kvstore=kvstore, tier_secret="of a benchmark")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asdict(spec), file)
        file.flush()
        command = [sys.executable, "-P", "-m", "workers", "--spec", file.name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
    try:
        with connect(ready["address"]) as worker:
            yield worker
    finally:
        process.terminate()
        process.wait(timeout=60)


def _longest_gap_s(worker: DirectWorker, run: int, proxy: StallingProxy | None) -> float:
    """Between two tokens of a stream, over RUN_S seconds. proxy: stalled for a while meanwhile."""
    names = [f"stream-{run}-{i}" for i in range(NUM_STREAMS)]
    for i, name in enumerate(names):
        worker.submit(name, [1 + (run * 31 + i) % 400] * 20, Part.WHOLE, max_tokens=1900)
    for name in names:
        worker.next_token(name)
    began_s = time.perf_counter()
    times_s: dict[str, list[float]] = {name: [] for name in names}
    reader = threading.Thread(target=_read, args=(worker, times_s), daemon=True)
    reader.start()
    if proxy is not None:
        proxy.stall()
    for number in itertools.count():
        since_s = time.perf_counter() - began_s
        if proxy is not None and since_s > STALL_S:
            proxy.resume()
        if since_s > RUN_S:
            break
        prompt = [2 + (run * 100 + number) % 400, *range(3, 2 + _PROMPT_TOKENS)]
        worker.submit(f"prompt-{run}-{number}", prompt, Part.PREFILL, max_tokens=2)
        time.sleep(_PROMPT_EVERY_S)
    for name in names:
        worker.cancel(name)
    reader.join()
    ends_s = began_s + RUN_S
    if any(worker.wait_finished(name).outcome != worker_pb2.REQUEST_OUTCOME_CANCELLED for name in names):
        raise RuntimeError("a stream ended while the tier was stalled")
    return max(
        min(after, ends_s) - before
        for times in times_s.values()
        for before, after in itertools.pairwise([began_s, *times])
        if before < ends_s
    )


def _read(worker: DirectWorker, times_s: dict[str, list[float]]) -> None:
    for name, times in times_s.items():
        with suppress(RuntimeError):  # all of its tokens are here
            while True:
                times.append(worker.next_token(name).came_s)


def measure_stalled_tier(redis_port: int, num_pairs: int = 5) -> list[Measurement]:
    """Milliseconds: the longest gap with and without the stall, and what it grows by, pair by pair."""
    proxy = StallingProxy(("127.0.0.1", redis_port))
    gaps_ms: dict[bool, list[float]] = {False: [], True: []}
    try:
        with _worker(f"redis://127.0.0.1:{proxy.port}/0", ROOT / "models" / "demo") as worker:
            _longest_gap_s(worker, 0, None)  # warm-up
            for pair, is_stalled in itertools.product(range(num_pairs), (False, True)):
                gap_s = _longest_gap_s(worker, 1 + 2 * pair + is_stalled, proxy if is_stalled else None)
                gaps_ms[is_stalled].append(1000 * gap_s)
                time.sleep(_TIER_RETURNS_S if is_stalled else 0)
    finally:
        proxy.close()
    setting: dict[str, object] = {"streams": NUM_STREAMS, "stall_s": STALL_S, "async_scheduling": True}
    growth_ms = _differences(gaps_ms[True], gaps_ms[False])
    return [
        Measurement("stalled_tier.longest_gap", "ms", gaps_ms[True], setting, {"without_stall": min(gaps_ms[False])}),
        Measurement("stalled_tier.longest_gap_without_stall", "ms", gaps_ms[False], setting),
        Measurement("stalled_tier.growth", "ms", growth_ms, setting),
    ]


def _differences(these: Sequence[float], those: Sequence[float]) -> list[float]:
    return [this - that for this, that in zip(these, those, strict=True)]
