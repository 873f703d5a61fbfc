"""The client alone and the router alone, each in an empty environment: neither brings torch, Triton or Ray.

The environments take what they need from the package index that pip is set up with.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fake_cluster import FakeCluster
from tests.fake_model import expected
from tests.processes import DEADLINE_S, REPOSITORY, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ENGINE = {"torch", "triton", "ray", "safetensors"}
PROMPT = tuple(range(1, 30))
NUM_TOKENS = 48

STREAM = """
import json, sys
from switchyard_client import Finished, GenerationClient, GenerationRequest, SamplingParams, Tokens

targets, prompt, num_tokens = json.loads(sys.argv[1])
sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
with GenerationClient(targets) as client:
    for event in client.generate(GenerationRequest(prompt, sampling)):
        if isinstance(event, Tokens):
            print(json.dumps(event.ids), flush=True)
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and the names of what is installed there."""

    folder: Path
    packages: set[str]

    def start(self, *command: str, **options: object) -> subprocess.Popen[str]:
        """One of its programs, in a process that finds nothing but the environment."""
        program, *arguments = command
        line = [str(self.folder / "bin" / program), *arguments]
        return subprocess.Popen(
            line, stdout=subprocess.PIPE, text=True, cwd=self.folder, env=outer_environment(), **options
        )


def outer_environment() -> dict[str, str]:
    """Without a way to our own packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=outer_environment())


@pytest.fixture(scope="module")
def package_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fails or skips, by the rule for what a machine lacks, where pip reaches nothing at all."""
    folder = tmp_path_factory.mktemp("index")
    found = pip(
        "download", "--quiet", "--retries", "1", "--timeout", "15", "--no-deps", "-d", str(folder), "setuptools"
    )
    if found.returncode != 0:
        complaint = f"no package index: {found.stderr.strip()[-300:]}"
        pytest.fail(complaint) if os.environ.get("CI") == "true" else pytest.skip(complaint)


def install(folder: Path, source: Path, extras: str = "") -> Environment:
    """A new environment with what is in `source`."""
    venv.create(folder, symlinks=True)
    target = ("--python", str(folder / "bin" / "python"))
    done = pip(*target, "install", "--quiet", f"{source}{extras}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(pip(*target, "list", "--format", "json").stdout)
    return Environment(folder, {row["name"].lower().replace("_", "-") for row in rows})


@pytest.fixture(scope="module")
def client_alone(tmp_path_factory: pytest.TempPathFactory, package_index: None) -> Environment:
    folder = tmp_path_factory.mktemp("client")
    unwanted = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY / "client", folder / "source", ignore=unwanted)  # pip builds in the source
    return install(folder / "environment", folder / "source")


@pytest.fixture(scope="module")
def router_alone(tmp_path_factory: pytest.TempPathFactory, package_index: None) -> Environment:
    folder = tmp_path_factory.mktemp("router")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    folders = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    folders = {"proto", "client"} | {name for name in folders if (REPOSITORY / name).is_dir()}
    unwanted = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", "*.so")
    for name in folders:
        shutil.copytree(REPOSITORY / name, folder / "source" / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, folder / "source")
    return install(folder / "environment", folder / "source", "[router]")


def test_the_client_brings_grpc_and_protobuf_and_no_more(client_alone: Environment) -> None:
    assert client_alone.packages - {"typing-extensions"} == {"switchyard-client", "grpcio", "protobuf"}


def test_the_client_streams_from_a_cluster_and_survives_its_router(
    client_alone: Environment, fake_cluster: Callable[..., FakeCluster]
) -> None:
    cluster = fake_cluster(prefill=1, decode=1, routers=2, step_s=0.02)
    order = json.dumps([cluster.targets, PROMPT, NUM_TOKENS])
    with client_alone.start("python", "-I", "-c", STREAM, order) as program:
        assert program.stdout is not None
        ids = [*json.loads(program.stdout.readline())]
        cluster.kill("router-0")
        for line in program.stdout:
            ids += json.loads(line)
        assert program.wait(DEADLINE_S) == 0
    assert ids == expected(PROMPT, NUM_TOKENS)


def test_the_router_brings_no_engine(router_alone: Environment) -> None:
    assert {"switchyard", "grpcio", "starlette"} <= router_alone.packages
    assert not ENGINE & router_alone.packages


@contextmanager
def running_router(environment: Environment, cluster: FakeCluster) -> Iterator[str]:
    """The gRPC address of a router of the environment, with the workers of the cluster."""
    spec, log = cluster.folder / "alone.json", cluster.folder / "alone.log"
    spec.write_text(json.dumps(dataclasses.asdict(cluster.router_spec("alone"))))
    with (
        log.open("w") as errors,
        environment.start("python", "-I", "-m", "router", "--spec", str(spec), stderr=errors) as router,
    ):
        try:
            assert router.stdout is not None
            line = router.stdout.readline()
            assert line, f"it ended while it was started: {log.read_text()}"
            yield json.loads(line)["grpc_address"]
        finally:
            router.kill()


def test_a_router_alone_serves_the_streams_of_workers_elsewhere(
    router_alone: Environment, fake_cluster: Callable[..., FakeCluster]
) -> None:
    cluster = fake_cluster(prefill=1, decode=1, routers=0)
    with running_router(router_alone, cluster) as address:
        order = json.dumps([[address], PROMPT, NUM_TOKENS])
        with router_alone.start("python", "-I", "-c", STREAM, order) as program:
            ids = [token_id for line in program.stdout or () for token_id in json.loads(line)]
        assert ids == expected(PROMPT, NUM_TOKENS)
        options = ("--target", address, "--prompt", "import os", "--max-tokens", "3", "--json")
        with router_alone.start("switchyard", "generate", *options) as command:
            answer, _ = command.communicate(timeout=DEADLINE_S)
    assert json.loads(answer)["num_output_tokens"] == 3


def test_the_command_of_a_routers_pod_needs_no_more(router_alone: Environment, tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text(
        json.dumps(
            {
                "name": "c",
                "model": {"path": str(REPOSITORY / "models" / "demo")},
                "kvstore": {"control": f"redis://127.0.0.1:{free_port()}/0"},  # away: the router starts all the same
                "endpoints": {"grpc_port": 0, "http_port": 0},
            }
        )
    )
    with router_alone.start("switchyard", "router", "--config", str(config), stderr=subprocess.PIPE) as router:
        try:
            assert router.stdout is not None
            line = router.stdout.readline()
            assert line, router.stderr and router.stderr.read()
            assert json.loads(line)["grpc_address"]
        finally:
            router.kill()


def test_a_command_that_needs_more_says_what_to_install(router_alone: Environment) -> None:
    model = str(REPOSITORY / "models" / "demo")
    with router_alone.start("switchyard", "serve", "--model", model, "--once", "x", stderr=subprocess.PIPE) as command:
        _, said = command.communicate(timeout=DEADLINE_S)
    assert command.returncode == 1
    assert "is not installed; pip install 'switchyard[cluster]'" in said
    assert said.count("\n") == 1
