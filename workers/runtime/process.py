"""One worker without Ray, its ranks as processes of this machine: `python -m workers --spec FILE`.

Prints one JSON line {"worker_id", "address", "pid", "rank_pids"} when it serves; SIGTERM ends it. When a rank is lost
it says which one, ends all others at once and exits with code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from settings.loading import SettingsError, load
from workers.config import WorkerSpec
from workers.errors import EngineError, RankLost, rank_name

_LAST_WORDS_S = 5.0
_LOOK_S = 0.05


def run_rank(spec: WorkerSpec, rank: int, init_method: str, interface: str, report: Connection) -> None:
    """A rank's process: serve until the parent closes the pipe or the shard fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from workers.runtime.rank import Rank

    try:
        shard = Rank(spec, rank)
        shard.connect(init_method, interface)
        report.send(("serving", shard.serve()))
    except EngineError as error:
        report.send(("refused", str(error)))
        return
    ended = threading.Event()
    threading.Thread(target=_wait_for_parent, args=(report, ended), daemon=True).start()
    shard.failure.add_done_callback(lambda failure: _die(report, failure.result()))
    ended.wait()
    shard.stop()
    os._exit(0)  # a follower's thread may still sit in a collective


def _die(report: Connection, error: BaseException) -> None:
    with contextlib.suppress(OSError):
        report.send(("failed", f"{type(error).__name__}: {error}"))
    os._exit(1)


def _wait_for_parent(report: Connection, ended: threading.Event) -> None:
    with contextlib.suppress(EOFError):
        report.recv()
    ended.set()


def _wait_for_ranks(pipes: list[Connection]) -> str | None:
    """The leader's address when all ranks serve; None, and one line on stderr, when one of them does not."""
    waiting, address, died = dict(enumerate(pipes)), "", ""
    died_s = float("inf")
    while waiting and time.monotonic() < died_s + _LAST_WORDS_S:
        for rank, pipe in list(waiting.items()):
            if not pipe.poll(_LOOK_S):
                continue
            del waiting[rank]
            try:
                state, detail = pipe.recv()
            except EOFError:  # perhaps because another rank refused: report that one's error
                died, died_s = died or f"rank {rank} died while it started", time.monotonic()
                continue
            if state == "refused":
                print(f"switchyard worker: {detail}", file=sys.stderr)
                return None
            address = address or str(detail)
    if died:
        print(f"switchyard worker: {died}", file=sys.stderr)
        return None
    return address


def _loss(spec: WorkerSpec, processes: Sequence[SpawnProcess], pipes: Sequence[Connection]) -> str:
    """Why ranks have ended. One that was killed is the cause of what the others say."""
    said = []
    for rank, (process, pipe) in enumerate(zip(processes, pipes, strict=True)):
        name = rank_name(rank, spec.engine.tp, spec.engine.pp)
        if process.exitcode is not None and process.exitcode < 0:
            return f"{name}, pid {process.pid}, was killed by {signal.Signals(-process.exitcode).name}"
        with contextlib.suppress(EOFError, OSError):
            if process.exitcode is not None and pipe.poll():
                words = str(pipe.recv()[1])
                said.append(words if words.startswith(RankLost.__name__) else f"{name}: {words}")
    return "; ".join(dict.fromkeys(said)) or "a rank died"


def _end_at_once(processes: Sequence[SpawnProcess]) -> None:
    """A stopped process does not see SIGTERM, and routers wait for its sockets to close."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(timeout=10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="JSON or YAML of workers.config.WorkerSpec")
    parser.add_argument("--interface", default="lo", help="network interface between the ranks")
    args = parser.parse_args()
    try:
        spec = load(WorkerSpec, args.spec)
    except SettingsError as error:
        print(f"switchyard worker: {error}", file=sys.stderr)
        return 2
    world = spec.engine.tp * spec.engine.pp
    meeting = tempfile.TemporaryDirectory(prefix="switchyard-ranks-")  # a file cannot be taken as a port can
    init_method = f"file://{meeting.name}/meeting"
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=run_rank, args=(spec, rank, init_method, args.interface, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    address = _wait_for_ranks(pipes)
    if address is None:
        return 2
    rank_pids = [process.pid for process in processes]
    said = {"worker_id": spec.worker_id, "address": address, "pid": os.getpid(), "rank_pids": rank_pids}
    print(json.dumps(said), flush=True)
    asked: list[int] = []  # not an Event: its lock may be held where a handler interrupts
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    while not asked:
        time.sleep(0.05)
        if not all(process.is_alive() for process in processes):
            print(f"switchyard worker: {_loss(spec, processes, pipes)}", file=sys.stderr)
            _end_at_once(processes)
            return 1
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(timeout=10)
    return 0
