"""Starts servers for tests in no time: imports what they need once, then forks for each: `python -m tests.prefork`.

Reads one JSON object a line, {"program": "worker" | "router" | "node", "spec": FILE, "output": FILE, "errors": FILE},
and answers with {"pid": PID}. Each child is a session of its own and does
what its real `main` does; when this process ends, so do they all.
"""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

import grpc.aio  # noqa: F401  # imported here so that no child has to

import kvstore.connect  # noqa: F401
import router.app  # noqa: F401
import workers.runtime.rank  # noqa: F401
from kvstore.node.process import main as node_main
from router.__main__ import main as router_main
from settings.loading import load
from workers.config import WorkerSpec
from workers.runtime.process import run_rank

_PR_SET_PDEATHSIG = 1


def _run_worker(spec: str) -> int:
    """A worker as `python -m workers` runs it, but rank 0 in this very process and the others forked from it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    loaded = load(WorkerSpec, spec)
    meeting = f"file://{spec}.{os.getpid()}.meeting"
    for rank in range(1, loaded.engine.tp * loaded.engine.pp):
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _, theirs = multiprocessing.Pipe()
            run_rank(loaded, rank, meeting, "lo", theirs)
            os._exit(2)
    ours, theirs = multiprocessing.Pipe()
    threading.Thread(target=_announce, args=(loaded, ours), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: ours.send("stop"))
    run_rank(loaded, 0, meeting, "lo", theirs)
    return 2  # it was refused: the last word says why


def _announce(spec: WorkerSpec, pipe: Connection) -> None:
    state, detail = pipe.recv()
    said = {"worker_id": spec.worker_id, "pid": os.getpid()}
    print(json.dumps({**said, "address" if state == "serving" else "refused": detail}), flush=True)


def _become(order: dict[str, str]) -> None:
    """The child: never returns."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        for number, path in ((0, "/dev/null"), (1, order["output"]), (2, order["errors"])):
            opened = os.open(path, os.O_RDONLY if number == 0 else flags, 0o600)
            os.dup2(opened, number)
            os.close(opened)
        if order["program"] == "worker":
            code = _run_worker(order["spec"])
        elif order["program"] == "node":
            code = node_main(["--spec", order["spec"]])
        else:
            code = router_main(["--spec", order["spec"]])
    except BaseException:
        logging.exception("%s failed", order["program"])
    finally:
        os._exit(code)


def main() -> None:
    """Serve until stdin ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # exit codes of children are not read: no zombies
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
