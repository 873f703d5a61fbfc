"""`switchyard status` against a running cluster: pools, workers, load, what is wrong, and the last decision."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from deploy.autoscaling.memory import Memory
from deploy.cli import cli
from deploy.errors import ConfigError, StartError
from planner.scaling.config import AutoscalingConfig
from planner.scaling.decide import ScalingState, decide
from planner.scaling.observation import Observation, PoolObservation
from planner.scaling.record import DecisionRecord, Start
from tests.cluster.deaths import prompt
from tests.fake_cluster import FakeCluster
from tests.processes import RedisServer, free_port, python_environment, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.redis, pytest.mark.timeout(300)]


def run(*options: str) -> tuple[int, str]:
    """`switchyard status`, in this process."""
    done = CliRunner().invoke(cli, ["status", *options], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return int(done.return_value), done.stdout


def test_status_on_one_screen_and_as_json(fake_cluster: Callable[..., FakeCluster], redis_server: RedisServer) -> None:
    cluster = fake_cluster(prefill=1, decode=2, routers=1, control=redis_server.url, cluster="shown")
    cluster.wait_complete()
    cluster.ask(cluster.client(), prompt(1), 8)
    observed = Observation((PoolObservation(name="decode", role="decode", num_ready=2, max_workers=3),))
    plan, _, explanation = decide(observed, ScalingState(), 1e9, AutoscalingConfig(mode="advise", policy="fixed"))
    record = DecisionRecord(1e9, observed, plan, explanation)
    Memory(redis_server.url, "shown").write(Start(AutoscalingConfig(), ScalingState()), record, ScalingState())
    code, text = run("--target", cluster.targets[0])
    assert code == 0
    lines = text.splitlines()
    assert lines[0].startswith("shown: fake, ready, 0 requests")
    assert any(line.split()[:3] == ["decode", "decode", "2"] for line in lines)
    assert sum(line.startswith("decode-") for line in lines) == 2
    assert "plan 1 at 2001-09-09 01:46:40+00:00 (fixed, advise)" in text
    code, said = run("--target", cluster.targets[0], "--json")
    found = json.loads(said)
    assert (code, found["is_ready"], len(found["workers"])) == (0, True, 3)
    assert {worker["role"] for worker in found["workers"]} == {"prefill", "decode"}
    assert found["decisions"][0]["decision"]["plan"]["plan_id"] == 1

    for name in ("decode-0", "decode-1"):
        cluster.kill(name)
    wait_until(lambda: run("--target", cluster.targets[0], "--json")[0] == 1, "it cannot serve any more")
    redis_server.kill()
    wait_until(lambda: "! the directory does not answer" in run("--target", cluster.targets[0])[1], "Redis is missed")


def test_ctrl_c_ends_a_watch_without_a_word(fake_cluster: Callable[..., FakeCluster]) -> None:
    cluster = fake_cluster(prefill=1, decode=1, routers=1, cluster="watched")
    cluster.wait_complete()
    command = [sys.executable, "-m", "deploy.cli", "status", "--watch", "--target", cluster.targets[0]]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=python_environment()
    ) as watch:
        assert watch.stdout is not None
        assert watch.stdout.readline().startswith("watched: fake, ready")
        watch.send_signal(signal.SIGINT)
        _, said = watch.communicate()
    assert (watch.returncode, said) == (0, "")


def test_mistakes_are_one_line() -> None:
    with pytest.raises(StartError, match=r"^127\.0\.0\.1:\d+: UNAVAILABLE"):
        run("--target", f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="--watch and --json exclude each other"):
        run("--watch", "--json")
