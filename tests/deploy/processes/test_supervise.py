"""Real child processes: small Python scripts that say when they are ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.errors import StartError
from deploy.processes.supervise import Ready, SupervisedProcess
from tests.processes import python_environment

READY = "import json, os, time; print(json.dumps({'pid': os.getpid()}), flush=True); time.sleep(600)"


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., SupervisedProcess]]:
    made: list[SupervisedProcess] = []

    def make(code: str, **options: int) -> SupervisedProcess:
        def command(_: Ready | None) -> list[str]:
            return [sys.executable, "-c", code]

        made.append(SupervisedProcess("child", command, dict(os.environ), tmp_path / "log", **options))
        made[-1].start()
        return made[-1]

    yield make
    for process in made:
        process.stop()


def test_it_reports_what_the_child_said_and_ends_it(supervise: Callable[..., SupervisedProcess]) -> None:
    process = supervise(READY)
    ready = process.wait_ready(20)
    assert ready["pid"] == process.pid
    process.stop()
    assert not is_alive(ready["pid"])
    assert process.pid is None


def test_a_killed_child_comes_back(supervise: Callable[..., SupervisedProcess]) -> None:
    process = supervise(READY)
    first = process.wait_ready(20)["pid"]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: process.wait_ready(1)["pid"] != first)
    assert process.num_restarts == 1
    assert is_alive(process.wait_ready(1)["pid"])


def test_the_next_child_gets_the_ready_line_of_the_one_before(tmp_path: Path) -> None:
    received: list[Ready | None] = []

    def command(before: Ready | None) -> list[str]:
        received.append(before)
        return [sys.executable, "-c", READY]

    process = SupervisedProcess("child", command, dict(os.environ), tmp_path / "log")
    process.start()
    first = process.wait_ready(20)
    os.kill(first["pid"], signal.SIGKILL)
    wait_until(lambda: len(received) == 2)
    process.stop()
    assert received == [None, first]


def test_a_child_that_cannot_start_is_reported_by_its_last_line(supervise: Callable[..., SupervisedProcess]) -> None:
    process = supervise("import sys; sys.exit('first\\nport 80 is in use')")
    with pytest.raises(StartError, match="child: port 80 is in use"):
        process.wait_ready(20)


def test_a_child_that_says_nothing_is_reported_by_its_exit_code(supervise: Callable[..., SupervisedProcess]) -> None:
    with pytest.raises(StartError, match="child: ended with exit code 3"):
        supervise("raise SystemExit(3)").wait_ready(20)


def test_a_first_start_may_be_tried_again(supervise: Callable[..., SupervisedProcess], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"import pathlib, sys; m = pathlib.Path({str(marker)!r})\nif not m.exists(): m.touch(); sys.exit(1)\n{READY}"
    assert is_alive(supervise(code, first_attempts=2).wait_ready(20)["pid"])


def test_a_killed_supervisor_leaves_no_child(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, sys, time
from deploy.processes.supervise import SupervisedProcess
log = pathlib.Path({str(tmp_path / "log")!r})
process = SupervisedProcess("child", lambda _: [sys.executable, "-c", {READY!r}], dict(os.environ), log)
process.start()
print(process.wait_ready(20)["pid"], flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=python_environment())
    assert parent.stdout is not None
    with parent.stdout as output:
        child = int(output.readline())
        assert is_alive(child)
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_alive(child))


def test_the_error_is_found_at_the_end_of_a_long_log(
    supervise: Callable[..., SupervisedProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor read the whole log, however long."""
    monkeypatch.setattr("deploy.processes.supervise._MOST_LOG_BYTES", 1 << 20)
    code = "import sys; sys.stderr.write('x' * 79 + '\\n' + 30000 * ('y' * 79 + '\\n')); sys.exit('the reason')"
    with pytest.raises(StartError, match=r"^child: the reason$"):
        supervise(code).wait_ready(20)
    assert (tmp_path / "log").stat().st_size > 1 << 20
    with pytest.raises(StartError, match=r"^child: the reason$"):
        supervise(code).wait_ready(20)
    assert (tmp_path / "log.1").stat().st_size == (tmp_path / "log").stat().st_size  # kept once
