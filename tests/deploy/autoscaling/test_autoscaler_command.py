"""`switchyard autoscaler` as a process: how it starts without its Redis, what it logs, and how it ends."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from deploy import cli
from deploy.autoscaling.problems import Problems
from tests.deploy.autoscaling.test_serve_api import dashboard
from tests.processes import RedisServer, free_port, python_environment, wait_until

pytestmark = pytest.mark.redis

CONFIG = "name: c\nautoscaling: {mode: act}\npools: {decode: {role: mixed}}\nkvstore: {control: 'URL'}\n"


def config_file(folder: Path, control: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(CONFIG.replace("URL", control))
    return path


class Running:
    """The process, and what it printed so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def end(self) -> int:
        """With SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait()
        self._thread.join()
        return code


@contextmanager
def autoscaler(path: Path, ray_dashboard: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "deploy.cli", "autoscaler", "--config", str(path), "--port", "0"]
    with subprocess.Popen(
        [*command, "--ray-dashboard", ray_dashboard],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=python_environment(),
    ) as process:
        try:
            yield Running(process)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda url: url.replace("redis://", "redis://somebody:wrong@"), "kvstore.control: Redis at 127.0.0.1:"),
        (lambda _: "redis://no-such-host.invalid:6379/0", "kvstore.control: Redis at no-such-host.invalid:6379: there"),
        (lambda url: url.replace("redis://", "rediss://"), "does not speak TLS: its URL begins with redis://"),
    ],
    ids=["password", "host", "tls"],
)
def test_a_redis_that_can_never_answer_ends_the_start(
    redis_server: RedisServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[str], str],
    message: str,
) -> None:
    path = config_file(tmp_path, change(redis_server.url))
    code = cli.run(["autoscaler", "--config", str(path), "--ray-dashboard", "http://127.0.0.1:1", "--port", "0"])
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert "wrong@" not in said.err


def test_a_redis_that_is_away_is_waited_for_and_warned_of_once(redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.kill()
    path = config_file(tmp_path, redis_server.url)
    with autoscaler(path, f"http://127.0.0.1:{free_port()}") as running:
        wait_until(lambda: "waits for Redis" in running.said, "it says that it waits")
        redis_server.start()
        wait_until(lambda: "this autoscaler acts now" in running.said, "it acts")
        wait_until(lambda: "serve: " in running.said, "it misses the dashboard")
        assert running.end() == 0
    lines = running.said.splitlines()
    assert sum("waits for Redis: kvstore.control: Redis at 127.0.0.1:" in line for line in lines) == 1
    assert sum("waits for Redis: works again" in line for line in lines) == 1


def test_sigterm_does_not_wait_for_a_dashboard_that_hangs(redis_server: RedisServer, tmp_path: Path) -> None:
    is_asked, is_over = threading.Event(), threading.Event()

    def hang(handler: BaseHTTPRequestHandler) -> None:
        is_asked.set()
        is_over.wait()

    with dashboard(hang) as url, autoscaler(config_file(tmp_path, redis_server.url), url) as running:
        is_asked.wait()
        assert running.end() == 0
        is_over.set()
    assert "given up" in running.said, "before the call's own end"
    assert "no answer within" not in running.said
    with redis_server.client() as client:
        assert not client.exists("switchyard:autoscaler1:c:lock")


def test_a_problem_that_lasts_is_logged_as_it_begins_each_minute_and_as_it_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = [0.0]
    caplog.set_level(logging.INFO)
    problems = Problems(lambda: now_s[0])
    for second in range(130):
        now_s[0] = float(second)
        problems.note("serve", "away")
        problems.over("lease")
    problems.over("serve")
    problems.over("serve")
    problems.note("serve", "away again")
    assert [record.getMessage() for record in caplog.records] == [
        "serve: away",
        "serve: for 60 s now, 61 times: away",
        "serve: for 120 s now, 121 times: away",
        "serve: works again, after 129 s",
        "serve: away again",
    ]
