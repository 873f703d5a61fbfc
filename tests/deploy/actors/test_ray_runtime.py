from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray

from deploy.actors import ray_runtime
from deploy.config import RayConfig
from deploy.errors import StartError

pytestmark = pytest.mark.cluster


class FlakyRay:
    """Stands in for ray.init: fails some times, each time leaving a process behind."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls: list[dict[str, Any]] = []
        self.left: list[subprocess.Popen[bytes]] = []

    def __call__(self, **options: Any) -> None:
        self.calls.append(options)
        if len(self.calls) <= self.failures:
            self.left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
            raise Exception("The current node timed out during startup.")  # Ray raises just this


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "prepare_ray_environment", lambda: None)
    monkeypatch.setattr(ray_runtime, "_describe", lambda config: "up")


@pytest.mark.usefixtures("described")
def test_a_start_that_was_too_slow_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flaky = FlakyRay(failures=2)
    monkeypatch.setattr(ray, "init", flaky)
    assert ray_runtime.open_ray(RayConfig(dashboard_port=1234), num_cpus=99, temp_dir=tmp_path) == "up"
    assert len(flaky.calls) == 3
    assert flaky.calls[-1]["num_cpus"] == 99
    assert flaky.calls[-1]["dashboard_port"] == 1234
    assert [process.wait(20) for process in flaky.left] == [-9, -9]


@pytest.mark.usefixtures("described")
def test_a_start_that_never_works_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flaky = FlakyRay(failures=99)
    monkeypatch.setattr(ray, "init", flaky)
    with pytest.raises(StartError, match=r"^Ray did not start: The current node timed out during startup\.$"):
        ray_runtime.open_ray(RayConfig(), num_cpus=1, temp_dir=tmp_path)
    assert [process.wait(20) for process in flaky.left] == [-9] * len(flaky.calls)


@pytest.mark.usefixtures("described")
def test_joining_starts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flaky = FlakyRay(failures=0)
    monkeypatch.setattr(ray, "init", flaky)
    ray_runtime.open_ray(RayConfig(address="h:1"), num_cpus=1, temp_dir=tmp_path)
    assert [call["address"] for call in flaky.calls] == ["h:1"]
    assert "num_cpus" not in flaky.calls[0]


class RobbedRay:
    """Stands in for ray.init: at first another process takes the port for metrics while it starts."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.thief: socket.socket | None = None

    def __call__(self, **options: Any) -> None:
        self.ports.append(options["_metrics_export_port"])
        if self.thief is None:
            self.thief = socket.create_server(("0.0.0.0", self.ports[0]))
            raise Exception("The current node timed out during startup.")


@pytest.mark.usefixtures("described")
def test_a_port_that_another_cluster_takes_during_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    robbed = RobbedRay()
    monkeypatch.setattr(ray, "init", robbed)
    assert ray_runtime.open_ray(RayConfig(), num_cpus=1, temp_dir=tmp_path) == "up"
    assert robbed.thief is not None
    robbed.thief.close()
    former, latter = robbed.ports
    assert former != latter


@pytest.mark.usefixtures("described")
def test_temporary_files_of_ray_lie_below_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its dashboard leaves a folder with a socket when it is killed, which is how Ray ends it."""
    monkeypatch.setenv("TMPDIR", "/tmp/../tmp")
    seen: list[str] = []

    def look(**options: object) -> None:
        code = "import tempfile; print(tempfile.gettempdir())"
        seen.append(subprocess.check_output([sys.executable, "-c", code], text=True).strip())

    before = tempfile.gettempdir()
    monkeypatch.setattr(ray, "init", look)
    ray_runtime.open_ray(RayConfig(), num_cpus=1, temp_dir=tmp_path / "ray")
    assert seen == [str(tmp_path / "ray" / "tmp")]
    assert os.environ["TMPDIR"] == "/tmp/../tmp"
    assert tempfile.gettempdir() == before
