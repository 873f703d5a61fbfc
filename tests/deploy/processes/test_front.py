"""Signals on their way to what `switchyard serve` runs: real processes, with a script instead of a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.processes import python_environment

SCRIPT = """
import os, signal, sys, time
from deploy.processes.front import run_behind_front
from deploy.processes.interrupts import Interrupts

def end_at_once():
    print("at once", flush=True)
    return True

def command():
    interrupts = Interrupts(end_at_once)
    try:
        print(os.getpid(), flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        interrupts.is_stopping = True
        print("asked", flush=True)
        time.sleep(float(sys.argv[1]))
        print("ended", flush=True)
        interrupts.restore()
        return int(sys.argv[2])

sys.exit(run_behind_front(command))
"""


class Front:
    def __init__(self, drain_s: float = 0.5, code: int = 0, before: tuple[str, ...] = ()) -> None:
        command = [*before, sys.executable, "-c", SCRIPT, str(drain_s), str(code)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=python_environment(), start_new_session=True
        )
        assert self.process.stdout is not None
        self.child = psutil.Process(int(self.process.stdout.readline()))

    def end(self) -> list[str]:
        """What was said until all had ended."""
        said, _ = self.process.communicate(timeout=20)
        return said.split("\n")[:-1]


@pytest.fixture
def front() -> Iterator[Callable[..., Front]]:
    made: list[Front] = []

    def make(*arguments: object, **options: object) -> Front:
        made.append(Front(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        for process in (each.process, each.child):
            if psutil.pid_exists(process.pid):
                process.kill()
        each.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_signal_asks_once(front: Callable[..., Front], number: signal.Signals, to_group: bool) -> None:
    running = front(code=3)
    assert os.getpgid(running.child.pid) != os.getpgid(running.process.pid)
    (os.killpg if to_group else os.kill)(running.process.pid, number)
    assert running.end() == ["asked", "ended"]
    assert running.process.returncode == 3


def test_two_signals_that_mean_one(front: Callable[..., Front]) -> None:
    """`timeout` signals its child and its group; shell and kernel both signal when a terminal is closed."""
    running = front(drain_s=2.5)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    running.process.send_signal(signal.SIGHUP)
    assert running.end() == ["asked", "ended"]
    assert running.process.returncode == 0


def test_a_second_one_as_of_a_double_ctrl_c_ends_at_once(front: Callable[..., Front]) -> None:
    running = front(drain_s=60)
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == ["asked", "at once"]
    assert running.process.returncode == 1


def test_a_killed_front_ends_the_rest_in_order(front: Callable[..., Front]) -> None:
    running = front()
    running.process.kill()
    assert running.end() == ["asked", "ended"]


def test_a_killed_child_gives_the_exit_code_that_a_shell_gives(front: Callable[..., Front]) -> None:
    running = front()
    running.child.kill()
    assert running.end() == []
    assert running.process.returncode == 128 + signal.SIGKILL


def test_nohup_is_respected(front: Callable[..., Front]) -> None:
    running = front(before=("nohup",))
    for process in (running.process, running.child):
        process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert running.process.poll() is None
    running.process.terminate()
    assert running.end() == ["asked", "ended"]
