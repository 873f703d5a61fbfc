"""Ranks of `python -m workers` that die, stop or hang: the worker ends within seconds and says which one it was."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from switchyard.v1 import worker_pb2

from tests.workers.tiny_llama import make_checkpoint
from tests.workers.worker_client import WorkerClient, wait_until
from workers.config import EngineConfig, WorkerSpec
from workers.errors import RankLost
from workers.parallel import ParallelGroups, Shard
from workers.runtime.coordination.progress import StepProgress
from workers.runtime.coordination.watch import RankWatch, WatchLimits

_GENEROUS_S = 60.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gqa", tmp_path_factory.mktemp("lost"))


@dataclass
class Worker:
    process: subprocess.Popen[str]
    address: str
    rank_pids: list[int]

    def said(self) -> str:
        """What it says to its user; it must have ended by itself."""
        _, errors = self.process.communicate(timeout=_GENEROUS_S)
        assert self.process.returncode == 1
        (line,) = [line for line in errors.splitlines() if line.startswith("switchyard worker: ")]
        return line

    @property
    def has_ranks(self) -> bool:
        return any(os.path.exists(f"/proc/{pid}") for pid in self.rank_pids)


@contextlib.contextmanager
def worker(folder: Path, checkpoint: Path, tp: int, pp: int) -> Iterator[Worker]:
    engine = EngineConfig(
        str(checkpoint), "float32", "cpu", tp=tp, pp=pp, block_size=4, num_blocks=64, rank_silence_s=3.0
    )
    (folder / "spec.json").write_text(json.dumps(asdict(WorkerSpec("w", "mixed", "mixed", engine))))
    command = [sys.executable, "-P", "-m", "workers", "--spec", str(folder / "spec.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    try:
        yield Worker(process, ready["address"], ready["rank_pids"])
    finally:
        for pid in ready["rank_pids"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


QUICK = {((2, 1), 0, signal.SIGKILL), ((1, 2), 1, signal.SIGSTOP)}  # each split, each rank and each signal once
_NAMES = {
    (2, 1): ["rank 0 of 2 (tp_rank 0, pp_stage 0", "rank 1 of 2 (tp_rank 1, pp_stage 0"],
    (1, 2): ["rank 0 of 2 (tp_rank 0, pp_stage 0", "rank 1 of 2 (tp_rank 0, pp_stage 1"],
}


@pytest.mark.parametrize(
    ("tp", "pp", "rank", "number"),
    [
        pytest.param(
            *split, rank, number,
            id=f"tp{split[0]}-pp{split[1]}-{('leader', 'follower')[rank]}-{number.name}",
            marks=[] if (split, rank, number) in QUICK else [pytest.mark.slow],
        )
        for split in ((2, 1), (1, 2))
        for rank in (0, 1)
        for number in (signal.SIGKILL, signal.SIGSTOP)
    ],
)  # fmt: skip
def test_a_rank_that_is_gone_is_named_and_ends_the_worker(tmp_path, checkpoint, tp, pp, rank, number) -> None:
    with worker(tmp_path, checkpoint, tp, pp) as running, WorkerClient(running.address) as client:
        client.submit("s", [1, 2, 3], worker_pb2.REQUEST_ROLE_MIXED, max_tokens=120)
        wait_until(lambda: len(client.tokens["s"]) > 3)
        os.kill(running.rank_pids[rank], number)
        said = running.said()
        name, pid = _NAMES[tp, pp][rank], running.rank_pids[rank]
        if number == signal.SIGKILL:
            assert said == f"switchyard worker: {name}), pid {pid}, was killed by SIGKILL"
        else:
            assert said.startswith(
                f"switchyard worker: RankLost: {name}, pid {pid} on {socket.gethostname()}) has said"
            )
            assert said.endswith("s: it is stopped, or its host is gone")
        wait_until(lambda: not running.has_ranks, _GENEROUS_S)
        assert "s" not in client.finished, "its router places it elsewhere when the connection breaks"


# ---- the watch alone
class _Group(ParallelGroups):
    """Of ranks that are threads of one process: knows the watch's address, and says who waits."""

    def __init__(self, shard: Shard, told: list[torch.Tensor]) -> None:
        super().__init__(shard, torch.device("cpu"))
        self._told = told
        self.waits = False

    def broadcast_words(self, words: torch.Tensor | None, fixed_words: int) -> torch.Tensor:
        if words is not None:
            self._told.append(words)
        return self._told[0]

    def is_waiting(self, thread: int) -> bool:
        return self.waits


@contextlib.contextmanager
def watches(stall_s: float, silence_s: float = 30.0) -> Iterator[tuple[list[RankWatch], list[_Group], list[list[str]]]]:
    told: list[torch.Tensor] = []
    groups = [_Group(Shard.of_rank(rank, 2, 1), told) for rank in range(2)]
    losses: list[list[str]] = [[], []]

    def note(rank: int):
        return lambda error: losses[rank].append(str(error))

    made = [RankWatch(group, WatchLimits(silence_s, stall_s), note(rank)) for rank, group in enumerate(groups)]
    for watch in made:
        watch.meet("127.0.0.1")
    leader = threading.Thread(target=made[0].start)
    leader.start()
    made[1].start()
    leader.join(_GENEROUS_S)
    yield made, groups, losses
    for watch in made:
        watch.stop()


@contextlib.contextmanager
def in_step(progress: StepProgress, sequence: int) -> Iterator[threading.Event]:
    """A thread of a rank that is in a step until this ends."""
    is_over = threading.Event()

    def stay() -> None:
        with progress.step(sequence):
            is_over.wait(_GENEROUS_S)

    thread = threading.Thread(target=stay)
    thread.start()
    yield is_over
    is_over.set()
    thread.join()


@pytest.mark.parametrize("hung", [0, 1])
def test_a_thread_that_hangs_is_told_from_one_that_waits_for_it(hung: int) -> None:
    with watches(stall_s=1.0) as (made, groups, losses):
        groups[1 - hung].waits = True
        with in_step(made[0].progress, 7), in_step(made[1].progress, 7):
            wait_until(lambda: bool(losses[0]), _GENEROUS_S)
    assert losses[0][0].startswith(f"rank {hung} of 2 (tp_rank {hung}, pp_stage 0, pid {os.getpid()} on ")
    assert ") hangs: no progress in step 7 for " in losses[0][0]
    assert losses[1] == []


def test_ranks_that_all_wait_are_lost_too() -> None:
    with watches(stall_s=1.0) as (made, groups, losses):
        groups[0].waits = True
        with in_step(made[0].progress, 9):  # for a message that nobody is about to send
            wait_until(lambda: bool(losses[0]), _GENEROUS_S)
    assert losses[0][0].startswith("rank 0 of 2 (")
    assert "waiting for other ranks" in losses[0][0]


def test_a_step_that_gets_on_may_take_as_long_as_it_likes() -> None:
    """A long prompt: the step is one, but its layers are counted."""
    with watches(stall_s=1.0) as (made, _, losses), in_step(made[1].progress, 7):
        for _ in range(15):
            made[1].progress.note()
            time.sleep(0.2)
        assert losses == [[], []]
        wait_until(lambda: bool(losses[0]), _GENEROUS_S)
    assert losses[0][0].startswith("rank 1 of 2")


def test_a_rank_that_fails_says_why() -> None:
    with watches(stall_s=30.0) as (made, _, losses):
        made[1].say(MemoryError("none left"))
        wait_until(lambda: bool(losses[0]), _GENEROUS_S)
    assert losses[0][0].startswith("rank 1 of 2 (")
    assert losses[0][0].endswith(") failed: MemoryError: none left")


def test_a_closed_connection_is_a_death_but_for_a_farewell() -> None:
    with watches(stall_s=30.0) as (made, _, losses):
        made[1].stop()
        time.sleep(0.5)
    assert losses == [[], []]
    with watches(stall_s=30.0) as (made, _, losses):
        made[1]._peers[0].connection.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: bool(losses[0]), _GENEROUS_S)
        error = made[0].explained(RuntimeError("Connection closed by peer"))
    assert losses[0][0].endswith("died: its connection closed")
    assert isinstance(error, RankLost)
    assert str(error) == losses[0][0]
