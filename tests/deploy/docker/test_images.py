"""The images of deploy/docker: what the files say, and (slow, as root) what comes out when each step is carried out.

There is no Docker here. `image_build` runs the steps in roots that debootstrap makes, and the commands as pods do.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from deploy.config import ROOT
from tests.deploy.docker import dockerfiles, image_build
from tests.deploy.docker.dockerfiles import Dockerfile, Instruction, Stage
from tests.deploy.docker.image_build import CannotBuild, Image
from tests.helm.rendering import CHART, objects, pods, ray_service

DOCKER = ROOT / "deploy" / "docker"
IMAGES = tuple(sorted(path.name.removesuffix(".Dockerfile") for path in DOCKER.glob("*.Dockerfile")))
PYPROJECT = ROOT / "pyproject.toml"
CPU = {"KERNEL_TOOLS": "", "TORCH": "2.13.0", "TRITON": "3.7.1"}
"""Arguments of a `ray` image without CUDA; README.md names them."""
PINNED = re.compile(r"[\w./-]+:[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?")


def read(image: str) -> Dockerfile:
    return dockerfiles.parse((DOCKER / f"{image}.Dockerfile").read_text())


def of_word(stage: Stage, *words: str) -> list[Instruction]:
    return [instruction for instruction in stage.instructions if instruction.word in words]


def sent() -> set[str]:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    return {path.as_posix() for path in dockerfiles.sent_files(ROOT, ignore)}


def constraints() -> dict[str, str]:
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==([\w.!]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(pins)
    return {normal(pin[1]): pin[2] for pin in pins if pin}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def default_of(image: str, argument: str) -> str:
    """Of a build argument."""
    (found,) = {
        dockerfiles.unquoted(one.text.partition("=")[2])
        for stage in read(image).stages
        for one in of_word(stage, "ARG")
        if one.text.startswith(f"{argument}=")
    }
    return found


def requirements_of(image: str) -> list[Requirement]:
    command = [sys.executable, str(DOCKER / "requirements.py"), str(PYPROJECT), *default_of(image, "EXTRAS").split()]
    return [Requirement(line) for line in subprocess.check_output(command, text=True).splitlines()]


# What the files say.


def test_each_image_of_the_chart_has_a_dockerfile() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["images"]
    assert set(IMAGES) == values.keys() - {"registry"}
    for image in IMAGES:
        (title,) = [
            dockerfiles.pairs_of(one)["org.opencontainers.image.title"]
            for one in of_word(read(image).stages[-1], "LABEL")
        ]
        assert title == values[image]["repository"]


@pytest.mark.parametrize("image", IMAGES)
def test_bases_are_pinned(image: str) -> None:
    file = read(image)
    names: set[str] = set()
    for stage in file.stages:
        if stage.base not in names:
            base = dockerfiles.expanded(stage.base, file.arguments)
            assert PINNED.fullmatch(base), base
            assert "latest" not in base
        names.add(stage.name)


@pytest.mark.parametrize("image", IMAGES)
def test_the_user_is_a_number_that_is_not_root(image: str) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["securityContext"]
    (user,) = of_word(read(image).stages[-1], "USER")
    assert user.text == f"{values['runAsUser']}:{values['runAsGroup']}" == "10001:10001"


@pytest.mark.parametrize("image", IMAGES)
def test_sources_exist_and_nothing_comes_from_elsewhere(image: str) -> None:
    file, files = read(image), sent()
    stages = {stage.name for stage in file.stages}
    for stage in file.stages:
        defaults = dict(one.text.partition("=")[::2] for one in of_word(stage, "ARG"))
        for one in of_word(stage, "COPY"):
            from_stage, sources, _ = dockerfiles.copy_of(one)
            if from_stage:
                assert from_stage in stages
                continue
            for source in sources:
                name = dockerfiles.expanded(source, defaults)
                assert name == "." or name in files or any(path.startswith(f"{name}/") for path in files), name
        for one in of_word(stage, "RUN"):
            assert not re.search(r"\b(curl|git clone)\b|https?://|\bwget -", one.text), one.text


@pytest.mark.parametrize("image", IMAGES)
def test_no_secret_stays_and_no_cache(image: str) -> None:
    file = read(image)
    for stage in file.stages:
        for one in of_word(stage, "ARG", "ENV"):
            assert not re.search(r"token|password|secret|index", one.text, re.I), one.text
        for one in of_word(stage, "RUN"):
            run = dockerfiles.run_of(one)
            if "apt-get install" in run.command:
                assert run.command.endswith("rm -rf /var/lib/apt/lists/*")
                assert "--no-install-recommends" in run.command
            if re.search(r"pip (install|wheel)", run.command):
                assert "--no-cache-dir" in run.command
                if "--no-index" not in run.command:
                    assert "PIP_CONSTRAINT=" in run.command
                    assert [mount.target for mount in run.mounts] == ["/etc/pip.conf"]
    assert not any(one for one in of_word(file.stages[-1], "COPY") if one.text.startswith(". "))


@pytest.mark.parametrize("image", IMAGES)
def test_the_command_is_ours_and_python_writes_nothing(image: str) -> None:
    last = read(image).stages[-1]
    (entrypoint,) = of_word(last, "ENTRYPOINT")
    assert dockerfiles.list_of(entrypoint) == ["switchyard"]
    scripts = metadata.distribution("switchyard").entry_points.select(group="console_scripts")
    assert "switchyard" in scripts.names
    environment: dict[str, str] = {}
    for one in of_word(last, "ENV"):
        environment |= dockerfiles.pairs_of(one)
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert environment["PATH"].startswith("/opt/venv/bin:")
    home = pods(objects("cpu"))[0].main["env"][0]
    assert (home["name"], home["value"]) == ("HOME", environment["HOME"])


def test_what_is_sent_to_the_builder() -> None:
    files = sent()
    assert {"pyproject.toml", "models/demo/config.json", "models/demo/model.safetensors"} <= files
    assert "kvstore/format/_copying.c" in files
    tops = {path.split("/")[0] for path in files}
    assert not tops & {"tests", "docs", "helm", "shared"}
    assert not any(re.search(r"(^|/)\.|\.so$|\.pyc$|__pycache__|Dockerfile$", path) for path in files)


def test_router_and_autoscaler_differ_in_extras_and_labels_only() -> None:
    texts = [(DOCKER / f"{name}.Dockerfile").read_text().splitlines()[1:] for name in ("router", "autoscaler")]
    changed = [one for one, other in zip(*texts, strict=True) if one != other]
    assert [re.split(r"[=]", line.strip())[0] for line in changed] == [
        "ARG EXTRAS",
        "LABEL org.opencontainers.image.title",
        "org.opencontainers.image.description",
    ]


@pytest.mark.parametrize("image", IMAGES)
def test_all_that_is_needed_is_pinned(image: str) -> None:
    pins = constraints() | {"torch": default_of("ray", "TORCH"), "triton": default_of("ray", "TRITON")}
    for needed in requirements_of(image):
        assert needed.specifier.contains(pins[normal(needed.name)]), needed
    names = {normal(needed.name) for needed in requirements_of(image)}
    assert ("torch" in names) == ("ray" in names) == (image == "ray")
    assert ("kubernetes" in names) == (image == "autoscaler")


def test_the_pins_are_those_that_the_tests_run_with() -> None:
    pins = constraints() | {"torch": CPU["TORCH"], "triton": CPU["TRITON"]}
    for line in (ROOT / "constraints-cpu.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            needed = Requirement(line)
            assert needed.specifier.contains(pins[normal(needed.name)]), line
    readme = (DOCKER / "README.md").read_text()
    assert all(f"`{name}={value}`" in readme for name, value in CPU.items())
    assert pins["ray"] == yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["version"]


@pytest.mark.parametrize(
    "text",
    [
        "FROM a:1\nADD https://x.example/y /y",
        "FROM a:1 AS",
        "RUN x",
        "FROM a:1\nRUN x \\",
        "FROM a:1\nVOLUME /x",
    ],
)
def test_what_the_reader_does_not_know_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"line|within"):
        dockerfiles.parse(text)


# What comes out.


def built(image: str, folder: Path) -> Image:
    """The image, from steps carried out here."""
    try:
        is_ray = image == "ray"
        base = image_build.base_root() if is_ray else image_build.python_root()
        return image_build.build(read(image), base, folder, CPU if is_ray else {})
    except CannotBuild as reason:
        if os.environ.get("CI") == "true" or not str(reason).startswith("needs"):
            pytest.fail(str(reason))
        pytest.skip(f"NO IMAGES, no step of a Dockerfile has run: {reason}")


@pytest.fixture(scope="module", params=IMAGES)
def image(request: pytest.FixtureRequest) -> Iterator[tuple[str, Image]]:
    with image_build.work_folder() as folder:
        yield request.param, built(request.param, folder)


def out(image: Image, *command: str, timeout_s: float = 120) -> str:
    done = image.run(*command, timeout_s=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules(image: Image, *names: str) -> list[str]:
    """Those of the modules that can be imported."""
    code = "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    return out(image, "python", "-c", code, *names).split()


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestBuilt:
    """Each image is built once for all of them."""

    def test_its_command_runs(self, image: tuple[str, Image]) -> None:
        _, made = image
        assert out(made, *made.entrypoint, "router", "--help").startswith("Usage: switchyard router")
        assert "version" in out(made, "switchyard", "--version")
        said = subprocess.run([sys.executable, "-m", "deploy.cli", "schema"], capture_output=True, text=True, cwd=ROOT)
        assert json.loads(out(made, "switchyard", "schema")) == json.loads(said.stdout)

    def test_what_can_be_imported(self, image: tuple[str, Image]) -> None:
        name, made = image
        more = {"router": [], "autoscaler": ["kubernetes"], "ray": ["torch", "triton", "ray"]}
        asked = ("router.app", "kvstore.format._copying", "kubernetes", "torch", "triton", "ray", "pip")
        assert modules(made, *asked) == ["router.app", "kvstore.format._copying", *more[name]]
        if name == "ray":
            out(made, "python", "-c", "import deploy.application, kernels, workers")
        else:
            assert modules(made, "setuptools", "safetensors") == []

    def test_the_demo_model_is_found(self, image: tuple[str, Image]) -> None:
        code = "from deploy.config import DEMO_MODEL; print(*sorted(p.name for p in DEMO_MODEL.iterdir()))"
        found = out(image[1], "python", "-c", code).split()
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found)

    def test_only_home_and_tmp_can_be_written(self, image: tuple[str, Image]) -> None:
        made = image[1]
        assert out(made, "sh", "-c", "id -u; touch $HOME/x /tmp/x /dev/shm/x && echo written").split() == [
            "10001",
            "written",
        ]
        for path in ("/opt/venv/x", "/etc/x", "/x"):
            assert made.run("touch", path).returncode != 0

    def test_neither_compilers_nor_pip_settings_stay(self, image: tuple[str, Image]) -> None:
        made = image[1]
        assert out(made, "sh", "-c", "command -v gcc cc g++ || echo none").strip() == "none"
        left = [
            path
            for path in ("etc/pip.conf", ".pip.conf", "root/.cache", "build", "source")
            if (made.root / path).exists()
        ]
        assert left == []
        assert not list((made.root / "var/lib/apt/lists").glob("*Packages*"))

    def test_packages_are_the_pinned_ones(self, image: tuple[str, Image]) -> None:
        name, made = image
        code = "from importlib.metadata import distributions as d; print(*[f'{i.name}=={i.version}' for i in d()])"
        pins, seen = constraints() | {"torch": CPU["TORCH"], "triton": CPU["TRITON"]}, {}
        for pair in out(made, "python", "-c", code).split():
            package, _, version = pair.partition("==")
            seen[normal(package)] = version.partition("+")[0]
        assert seen.pop("switchyard") == made.labels["org.opencontainers.image.version"]
        assert seen == {package: pins.get(package) for package in seen}
        print(f"{name}: {len(seen)} packages, {folder_mb(made.root)} MB")

    def test_it_serves(self, image: tuple[str, Image]) -> None:
        {"router": router_serves, "autoscaler": autoscaler_starts, "ray": ray_starts}[image[0]](image[1])


def folder_mb(folder: Path) -> int:
    return int(subprocess.check_output(["du", "-sxm", str(folder)], text=True).split()[0])


ANSWERS = """
import subprocess, sys, time, urllib.request
port, *command = sys.argv[1:]
control = "kvstore: {control: 'redis://127.0.0.1:6379/0'}"
open("/tmp/cluster.yaml", "w").write(f"{{name: c, {control}, autoscaling: {{mode: advise}}}}")
started = subprocess.Popen([*command, "--config", "/tmp/cluster.yaml"])
for _ in range(300):
    time.sleep(0.1)
    try:
        print(urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2).status)
        break
    except OSError:
        assert started.poll() is None, f"{command} ended"
else:
    raise SystemExit("it does not answer")
"""
"""Starts a command, as its pod does, until it answers the kubelet. Redis is away, and may come later."""


def router_serves(made: Image) -> None:
    said = out(made, "python", "-c", ANSWERS, "8000", "switchyard", "router")
    assert said.strip().splitlines()[-1] == "200"


def autoscaler_starts(made: Image) -> None:
    command = ("switchyard", "autoscaler", "--ray-dashboard", "http://127.0.0.1:8265")
    assert out(made, "python", "-c", ANSWERS, "9300", *command).strip().splitlines()[-1] == "200"
    out(made, "python", "-c", "from deploy.autoscaling import on_kubernetes")


def ray_starts(made: Image) -> None:
    """A head and what KubeRay does with the image: its shells, its autoscaler, and the chart's own probes."""
    assert "2.60.0" in out(made, "ray", "--version")
    assert "2.60.0" in out(made, "bash", "-lc", "ray --version")
    assert "cluster-name" in out(made, "bash", "-lc", "ray kuberay-autoscaler --help")
    head = ray_service(objects("cpu"))["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    probe = head["containers"][0]["readinessProbe"]["exec"]["command"]
    assert "wget" in probe[-1]
    options = "--head --num-cpus=0 --dashboard-host=0.0.0.0 --dashboard-agent-listen-port=52365 --block"
    code = f"""
import subprocess, time
subprocess.Popen(["/bin/bash", "-c", "ray start {options} --object-store-memory=104857600 >/tmp/log 2>&1"])
for _ in range(90):
    time.sleep(1)
    if subprocess.run({probe!r}, stdout=subprocess.DEVNULL).returncode == 0:
        print("ready")
        break
else:
    print(open("/tmp/log").read())
subprocess.run(["python", "-m", "deploy.actors.drain_node", "--help"], check=True)
"""
    said = out(made, "python", "-c", code, timeout_s=240)
    assert "ready" in said.split(), said
