"""Parts of a cluster that are started apart from one YAML: what is refused, and that a Redis is waited for."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import config
from deploy.application import build
from deploy.errors import ConfigError
from deploy.standalone import check_standalone, cluster_id, router_spec, run_dir
from tests.fake_model import write_fake_model
from tests.processes import RedisServer, free_port, python_environment, redis_executable, wait_until

SECRET = "a secret of many characters"


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A configuration that is complete."""
    (tmp_path / "secret").write_text(SECRET)
    return {
        "name": "apart",
        "model": {"path": str(write_fake_model(tmp_path / "model"))},
        "engine": {"runner": "fake"},
        "kvstore": {
            "control": "redis://127.0.0.1:1/0",
            "peers": True,
            "tier_secret_file": str(tmp_path / "secret"),
        },
    }


def write(tmp_path: Path, raw: dict[str, Any]) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def with_key(raw: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    config.set_key(raw, f"{key}={json.dumps(value)}")
    return raw


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "", "name: must be set where routers and pools are started apart"),
        ("kvstore.control", "memory://", "kvstore.control: must be a redis:// URL where routers and pools are"),
        ("kvstore.tier_secret_file", "", "kvstore.tier_secret_file: must be set with kvstore.peers"),
        ("kvstore.control_password_file", "/nowhere", "kvstore.control_password_file: /nowhere: No such file"),
    ],
)
def test_what_parts_could_not_find_each_other_by_is_refused(
    raw: dict[str, Any], key: str, value: object, message: str
) -> None:
    check_standalone(config.parse(raw))
    with pytest.raises(ConfigError) as refused:
        check_standalone(config.parse(with_key(raw, key, value)))
    assert str(refused.value).startswith(message)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": "decode"}, "args: must be config and pool, not pool"),
        ({"config": "/nowhere.yaml", "pool": "decode"}, "/nowhere.yaml: No such file"),
        ({"config": "", "pool": "mixed"}, "pools: there is no 'mixed', only prefill, decode"),
    ],
)
def test_an_application_needs_the_yaml_and_a_pool_of_it(
    raw: dict[str, Any], tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    path = write(tmp_path, raw)
    with pytest.raises(ConfigError) as refused:
        build({key: value or path for key, value in arguments.items()})
    assert message in str(refused.value)


def test_an_application_says_on_which_device_it_runs(raw: dict[str, Any], tmp_path: Path) -> None:
    """Ray may have no node yet: what it has says nothing."""
    path = write(tmp_path, with_key(raw, "engine.runner", "torch"))
    with pytest.raises(ConfigError, match=r"^pools\.prefill\.device: must be cpu or cuda"):
        build({"config": path, "pool": "prefill"})


def test_each_build_has_the_same_identity(raw: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, raw)
    built = [build({"config": path, "pool": pool}) for pool in ("prefill", "decode", "prefill")]
    deployments = [application._bound_deployment for application in built]
    plans, nodes = zip(*(deployment.init_args for deployment in deployments), strict=True)
    assert [plan.name for plan in plans] == ["prefill", "decode", "prefill"]
    assert nodes[0] == nodes[1] == nodes[2]
    assert nodes[0].cluster == "apart"
    assert plans[0] == plans[2]
    assert SECRET not in repr(nodes[0])
    parsed = config.parse(raw)
    assert nodes[0].run_dir == str(run_dir(parsed))
    assert cluster_id(parsed) in nodes[0].run_dir


def test_a_router_keeps_its_id_and_reads_no_weights(raw: dict[str, Any]) -> None:
    parsed = config.parse(raw)
    spec = router_spec(parsed, "pod-1")
    assert spec == router_spec(parsed, "pod-1")
    assert spec.router_id != router_spec(parsed, "pod-2").router_id
    assert (spec.weights, spec.cluster, spec.journal) == ("", "apart", "redis://127.0.0.1:1/0")


@pytest.mark.redis
@pytest.mark.parametrize("part", ["router", "autoscaler"])
def test_a_redis_that_is_away_is_said_and_waited_for(raw: dict[str, Any], tmp_path: Path, part: str) -> None:
    redis_port, port, grpc_port = free_port(), free_port(), free_port()
    raw["kvstore"]["control"] = f"redis://127.0.0.1:{redis_port}/0"
    raw["endpoints"] = {"http_port": port, "grpc_port": grpc_port}
    raw["autoscaling"] = {"mode": "advise", "interval_s": 0.1}
    command = [sys.executable, "-m", "deploy.cli", part, "--config", write(tmp_path, raw)]
    if part == "autoscaler":
        command += ["--ray-dashboard", f"http://127.0.0.1:{free_port()}", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=python_environment(), cwd="/")
    try:
        away, back = {
            "router": ("the directory is away", '"directory_is_up":true'),
            "autoscaler": ("waits for Redis: kvstore.control: Redis at 127.0.0.1", "switchyard_autoscaler_leader 1.0"),
        }[part]
        wait_until(lambda: away in log.read_text(), "it says that the Redis is away")
        path = "readyz" if part == "router" else "metrics"
        assert back not in _get(f"http://127.0.0.1:{port}/{path}")
        executable = redis_executable()
        assert executable is not None
        server = RedisServer(executable, redis_port)
        try:
            wait_until(lambda: back in _get(f"http://127.0.0.1:{port}/{path}"), "it goes on")
        finally:
            server.kill()
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(30) == 0, log.read_text()


def _get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError:
        return ""
