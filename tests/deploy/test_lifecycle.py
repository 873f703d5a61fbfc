"""Whole clusters in unfriendly surroundings, and their ends: nothing foreign is executed, and nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.host import free_port
from tests.deploy.serving import LOOPBACK, PROMPT, SWITCHYARD, Serving, Stream, Surroundings
from tests.processes import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

# Names that our processes and Ray's import, early and late.
FOREIGN = (
    *(
        "router",
        "workers",
        "kvstore",
        "deploy",
        "costs",
        "planner",
        "switchyard",
        "redis",
        "grpc",
        "torch",
        "ray",
        "yaml",
    ),
    *("json", "numpy", "psutil", "click", "uvicorn", "starlette", "pydantic", "tokenizers", "logging", "asyncio"),
    *("socket", "typing", "uuid", "runpy", "multiprocessing", "aiohttp", "xxhash"),
)
SLOW = "engine.fake_step_s=0.1"


@pytest.fixture
def surroundings(tiny_model: Path) -> Iterator[Surroundings]:
    folder = Path(tempfile.mkdtemp(prefix="syl-", dir="/tmp"))  # a short path: Ray makes sockets far below it
    yield Surroundings(folder, tiny_model)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def serve(surroundings: Surroundings, tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    made: list[Serving] = []

    def start(*settings: str, **options: object) -> Serving:
        made.append(Serving(surroundings.command(settings=settings), **{"cwd": tmp_path, **options}))
        return made[-1]

    yield start
    for serving in made:
        serving.close()


def foreign_folder(folder: Path) -> Path:
    """A folder with modules of other people, each of which says so when it is executed."""
    for name in FOREIGN:
        said = f"open({str(folder / 'executed')!r}, 'a').write({name!r} + '\\n')"
        (folder / f"{name}.py").write_text(f"{said}\nraise RuntimeError('the wrong {name}')\n")
    return folder


def dead_proxies() -> dict[str, str]:
    proxy = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    names = [name for each in ("http", "https", "all", "grpc") for name in (f"{each}_proxy", f"{each}_proxy".upper())]
    return {**dict.fromkeys(names, proxy), "no_proxy": "", "NO_PROXY": ""}


def test_a_cluster_among_foreign_modules_and_dead_proxies_on_ipv6(
    surroundings: Surroundings, serve: Callable[..., Serving], tmp_path: Path
) -> None:
    """And a SIGTERM to its process group, which ends a running stream in order."""
    cwd = foreign_folder(tmp_path)
    environment = dead_proxies()
    serving = serve(
        "ray.node_ip=::1",
        "endpoints.grpc_host=::1",
        "endpoints.http_host=[::1]",
        SLOW,
        cwd=cwd,
        environment=environment,
    )
    assert serving.router["grpc"].startswith("[::1]:")
    assert serving.router["http"].startswith("[::1]:")
    asked = subprocess.run(
        [SWITCHYARD, "generate", "--target", serving.router["grpc"], "--prompt", PROMPT, "--max-tokens", "3", "--json"],
        capture_output=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr.decode()
    assert json.loads(asked.stdout)["num_output_tokens"] == 3
    assert not (cwd / "executed").exists(), (cwd / "executed").read_text()

    deadline_s = time.monotonic() + 30
    while (
        b"ray_switchyard_worker_generated_tokens_total"
        not in LOOPBACK.open(serving.said["endpoints"]["metrics"]).read()
    ):
        assert time.monotonic() < deadline_s, "Ray's processes send no metrics"
        time.sleep(0.5)

    stream = Stream(serving.router, num_tokens=30)
    below = serving.below()
    serving.signal_group(signal.SIGTERM)
    assert serving.process.wait(60) == 0, serving.stderr
    stream.join(10)
    assert stream.error is None
    assert [line for line in stream.lines if line][-1] == "data: [DONE]"
    assert stream.num_tokens == 30
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert surroundings.left() == []
    assert not (cwd / "executed").exists(), (cwd / "executed").read_text()


def test_a_closed_terminal_ends_a_cluster_in_order(surroundings: Surroundings, serve: Callable[..., Serving]) -> None:
    serving = serve(SLOW, on_terminal=True)
    below = serving.below()
    stream = Stream(serving.router, num_tokens=20)
    serving.close_terminal()
    time.sleep(0.2)
    serving.signal_group(signal.SIGHUP)  # the shell and the kernel each send one
    assert serving.process.wait(60) == 0, serving.stderr
    stream.join(10)
    assert stream.error is None
    assert [line for line in stream.lines if line][-1] == "data: [DONE]"
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert surroundings.left() == []


@pytest.mark.slow  # a cluster in somebody else's Ray gets a second one, too
def test_a_second_sigterm_ends_at_once_and_leaves_nothing(
    surroundings: Surroundings, serve: Callable[..., Serving]
) -> None:
    serving = serve(SLOW, "router.drain_s=60")
    below = serving.below()
    stream = Stream(serving.router, num_tokens=300)
    began_s = time.monotonic()
    serving.process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert serving.process.poll() is None
    assert "streams may go on for 60 s (router.drain_s); a second signal stops at once\n" in serving.stderr
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(30) == 1
    assert time.monotonic() - began_s < 15
    stream.join(10)
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert surroundings.left() == []


def test_what_was_killed_or_has_failed_goes_at_the_next_start(
    surroundings: Surroundings, serve: Callable[..., Serving], tmp_path: Path
) -> None:
    killed = serve()
    below = killed.below()
    killed.kill()
    assert psutil.wait_procs(below, timeout=20)[1] == []
    run_dir, arena = surroundings.left()

    # A start that fails keeps its folder, and has removed the other.
    (tmp_path / "sqlite3.py").write_text("raise ImportError('only the routers want this')")
    failing = serve(environment={"PYTHONPATH": str(tmp_path)}, is_ready=False)
    assert failing.process.wait(60) == 1
    (kept,) = surroundings.left()
    assert kept not in (run_dir, arena)
    assert f"(logs in {surroundings.temp_dir / kept})" in failing.stderr

    front_killed = serve()
    (held, held_arena) = surroundings.left()
    assert kept not in (held, held_arena)
    below = front_killed.below()
    front_killed.process.kill()  # the front alone: the rest ends in order
    assert psutil.wait_procs(below, timeout=30)[1] == []
    assert surroundings.left() == []


@pytest.mark.parametrize(
    "after_s", [pytest.param(0.3, marks=pytest.mark.slow), 1.5, pytest.param(3.0, marks=pytest.mark.slow), 5.0]
)
def test_a_start_that_is_interrupted_leaves_nothing(
    surroundings: Surroundings, serve: Callable[..., Serving], after_s: float
) -> None:
    starting = serve(is_ready=False)
    time.sleep(after_s)
    below = starting.below()
    starting.signal_group(signal.SIGTERM)
    code = starting.process.wait(30)
    assert code in (1, 128 + signal.SIGTERM)  # the latter: before there was anything to be ended
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert surroundings.left() == []


WORKERLESS_PLUGIN = """
import sys
from dataclasses import replace

from workers.model.families import llama

if "torch" in sys.modules:  # of all processes, only the workers have it
    raise OSError("libfast.so.1: cannot open shared object file")
FAMILIES = tuple(replace(family, architecture="Another") for family in llama.FAMILIES[:1])
"""


def test_a_worker_that_can_never_start_ends_the_start_with_one_line(
    surroundings: Surroundings, serve: Callable[..., Serving], tmp_path: Path
) -> None:
    """A plugin that the command can import and the workers cannot; Serve alone would try again for long."""
    (tmp_path / "workerless.py").write_text(WORKERLESS_PLUGIN)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    failing = serve("model.plugins=[workerless]", environment={"PYTHONPATH": paths}, is_ready=False)
    assert failing.process.wait(60) == 1
    (kept,) = surroundings.left()
    problem = "model.plugins: workerless cannot be imported (libfast.so.1: cannot open shared object file)"
    logs = f"(logs in {surroundings.temp_dir / kept})"
    ends = [f"switchyard: pool {pool}: {problem} {logs}" for pool in ("prefill", "decode")]
    assert failing.stderr.splitlines()[-1] in ends


@pytest.fixture
def own_ray(tmp_path: Path) -> Iterator[str]:
    """Address of a Ray cluster that is not ours."""
    folder, address = Path(tempfile.mkdtemp(prefix="syr-", dir="/tmp")), f"127.0.0.1:{free_port('127.0.0.1')}"
    command = [str(Path(SWITCHYARD).with_name("ray")), "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
    command += ["--port", address.rpartition(":")[2], "--include-dashboard", "false", "--temp-dir", str(folder)]
    command += ["--num-cpus", "4", "--object-store-memory", str(100 * 2**20), "--disable-usage-stats"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "ray.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    wait_until(lambda: "Ray runtime started" in (tmp_path / "ray.log").read_text(), "Ray runs")
    yield address
    for below in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        with contextlib.suppress(psutil.Error):
            below.kill()
    process.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def test_what_a_killed_driver_left_in_somebody_elses_ray(
    own_ray: str, surroundings: Surroundings, serve: Callable[..., Serving]
) -> None:
    """And a second SIGTERM to a cluster there, whose workers are not below us."""
    killed = serve(f"ray.address={own_ray}")
    killed.kill()
    run_dir, arena = surroundings.left()
    running = serve(f"ray.address={own_ray}", SLOW, "router.drain_s=60")
    assert f"ending cluster {run_dir.removeprefix('sy-')}" in running.stderr
    assert run_dir not in surroundings.left()
    assert arena not in surroundings.left()
    stream = Stream(running.router, num_tokens=300)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == 0, running.stderr
    stream.join(10)
    assert surroundings.left() == []
