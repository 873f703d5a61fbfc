"""What a long prompt's KV is worth: KV transfer beside a running prefill, and a failover from the tiers.

    overlap    how much of a prompt the decode worker holds, verified, when the step of the prefill worker's last chunk
               ends, and how soon after that its own first step begins; until_continue: the part of it until its
               engine got Continue
    failover   a stream's next token on another worker: its history pulled from the tiers, beside computed again

Workers and a KV node as processes of this machine, on random weights of a 0.4 B model; no router and no Ray, so that
nothing but engine, transfer and tiers is timed.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import direct
from bench.direct import DirectWorker, Part
from bench.peers.models import HALF, write_random_model
from bench.rows import Measurement
from kvstore.config import KVStoreConfig, NodeSpec
from kvstore.tiers.host.arena import arena_path
from settings.loading import write
from workers.config import EngineConfig, WorkerSpec

PROMPT_TOKENS = 4096
BLOCK_SIZE = 16
RUNS, OVERLAP_RUNS = 3, 5
_SAMPLE_S = 0.002
_CLOCK_SLACK_S = 0.001


@dataclass(frozen=True, slots=True)
class _Node:
    host_address: str
    control_url: str


def bench_overlap() -> list[Measurement]:
    """Prompts of 4,096 tokens from a prefill worker to a decode worker of the same host, by the workers' own clocks."""
    shares, relays_ms, gaps_ms, tokens_ms, rng = [], [], [], [], random.Random(0)
    num_blocks = PROMPT_TOKENS // BLOCK_SIZE
    with _machine() as (stack, model, node):
        prefill = stack.enter_context(_worker(_spec(model, node, "prefill", max_num_batched_tokens=256)))
        decode = stack.enter_context(_worker(_spec(model, node, "decode")))
        for run in range(OVERLAP_RUNS):
            ids, name = _ids(rng), f"overlap-{run}"
            held_before = decode.load().num_transferred_blocks
            clock_offset_s = time.time() - time.monotonic()
            with _held_blocks(decode) as held:
                decode.submit(name, ids, Part.DECODE, max_tokens=2)
                prefill.submit(name, ids, Part.PREFILL, max_tokens=2)
                decode.let_continue(name, [prefill.next_token(name).token_id])
            prefilled, done = prefill.wait_finished(name).times, decode.wait_finished(name)
            decoded = done.times
            if abs(time.time() - time.monotonic() - clock_offset_s) > _CLOCK_SLACK_S:
                raise SystemExit("switchyard bench: the machine's clock was set while it was read")
            if done.num_transferred_blocks != num_blocks or done.num_computed_prompt_tokens:
                raise SystemExit("switchyard bench: not all blocks came, so that the first step began without them")
            ended_s = prefilled.first_token_s
            at_the_end = max((count for when_s, count in held if when_s <= ended_s), default=held_before)
            shares.append((at_the_end - held_before) / num_blocks)
            relays_ms.append(1000 * (decoded.continued_s - ended_s))
            gaps_ms.append(1000 * (decoded.first_step_s - ended_s))
            tokens_ms.append(1000 * (decoded.first_token_s - ended_s))
    setting: dict[str, object] = {"prompt_tokens": PROMPT_TOKENS, "chunk_tokens": 256, "model": "0.4 B, fp32"}
    beside = {"until_continue": statistics.median(relays_ms), "until_its_token": statistics.median(tokens_ms)}
    return [
        Measurement("overlap.held_at_last_chunk", "of the blocks", shares, setting),
        Measurement("overlap.first_step_after", "ms", gaps_ms, setting, beside),
    ]


@contextmanager
def _held_blocks(worker: DirectWorker) -> Iterator[list[tuple[float, int]]]:
    """How many blocks the worker has pulled, with the Unix time of its report, until the block ends."""
    held: list[tuple[float, int]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_S):
            count = worker.load().num_transferred_blocks
            held.append((time.time(), count))

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        yield held
    finally:
        over.set()
        watcher.join()


def bench_failover() -> list[Measurement]:
    """The next token of a stream with a history of 4,096 tokens, on a worker that never saw it."""
    took_s: dict[str, list[float]] = {"always": [], "never": []}
    with _machine() as (stack, model, node):
        # One engine at a time has work; without prefix caching every run begins with nothing on the device.
        workers = {
            fetch: stack.enter_context(
                _worker(_spec(model, node, "mixed", name=fetch, prefix_fetch=fetch, enable_prefix_caching=False))
            )
            for fetch in took_s
        }
        first = stack.enter_context(_worker(_spec(model, node, "mixed", name="first")))
        rng = random.Random(1)
        for run in range(RUNS):
            ids, name = _ids(rng), f"failover-{run}"
            first.submit(name, ids, Part.WHOLE, max_tokens=1)
            first.wait_finished(name)
            time.sleep(1.0)  # its last blocks are written back beside the steps
            for fetch, worker in workers.items():
                began_s = time.perf_counter()
                worker.submit(name, ids, Part.WHOLE, max_tokens=1)
                took_s[fetch].append(worker.next_token(name).came_s - began_s)
                finished = worker.wait_finished(name)
                if (fetch == "always") != (finished.num_transferred_blocks > 0):
                    raise SystemExit(
                        f"switchyard bench: {finished.num_transferred_blocks} blocks were pulled ({fetch})"
                    )
    setting: dict[str, object] = {"history_tokens": PROMPT_TOKENS, "model": "0.4 B, fp32", "detection": "not included"}
    ratios = [slow / quick for slow, quick in zip(took_s["never"], took_s["always"], strict=True)]
    beside = {"recomputed": statistics.median(took_s["never"])}
    return [
        Measurement("failover.next_token_from_tier", "s", took_s["always"], setting, beside),
        Measurement("failover.faster_than_recomputing", "times", ratios, setting),
    ]


def _ids(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(1, 32000) for _ in range(PROMPT_TOKENS))


# ---- processes


@contextmanager
def _machine() -> Iterator[tuple[ExitStack, Path, _Node]]:
    """A model directory and a KV node; what enters the stack ends before them."""
    with tempfile.TemporaryDirectory(prefix="sy-bench-") as folder, _kv_node(Path(folder)) as node:
        model = Path(folder) / "model"
        write_random_model(model, replace(HALF, max_position_embeddings=2 * PROMPT_TOKENS))
        with ExitStack() as stack:
            yield stack, model, node


def _spec(model: Path, node: _Node, role: str, name: str = "", prefix_fetch: str = "always", **engine: object) -> str:
    num_blocks = 2 * PROMPT_TOKENS // BLOCK_SIZE
    config = EngineConfig(str(model), device="cpu", block_size=BLOCK_SIZE, num_blocks=num_blocks, **engine)  # type: ignore[arg-type]
    spec = WorkerSpec(
        worker_id=f"{role}-{name or 0}",
        pool=role,
        role=role,
        engine=config,
        node_id="bench",
        host_address=node.host_address,
        control=node.control_url,
        kvstore=KVStoreConfig(prefix_fetch=prefix_fetch),
    )
    return json.dumps(asdict(spec))


@contextmanager
def _kv_node(folder: Path) -> Iterator[_Node]:
    slot_bytes = 24 * 2 * BLOCK_SIZE * 64 * 4  # one block of one head, all layers, fp32
    arena = arena_path("/dev/shm", "bench")
    num_slots = 8 * 2 * PROMPT_TOKENS // BLOCK_SIZE
    address = f"unix:{folder}/node.sock"
    write(folder / "node.json", NodeSpec("bench", arena, slot_bytes, num_slots, address, "127.0.0.1:0"))
    with _process([sys.executable, "-P", "-m", "kvstore.node", "--spec", str(folder / "node.json")]) as ready:
        yield _Node(str(ready["host_address"]), f"memory://{ready['control_address']}")


@contextmanager
def _worker(spec: str) -> Iterator[DirectWorker]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(spec)
        file.flush()
        command = [sys.executable, "-P", "-m", "workers", "--spec", file.name]
        with _process(command) as ready, direct.connect(str(ready["address"])) as worker:
            yield worker


@contextmanager
def _process(command: list[str]) -> Iterator[dict[str, object]]:
    """A child process and the JSON line that it prints when it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"switchyard bench: {' '.join(command)} did not start")
        yield json.loads(line)
    finally:
        process.terminate()
        process.wait(timeout=60)
