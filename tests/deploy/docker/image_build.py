"""Carries out a Dockerfile without Docker: each RUN in a root of its own, made by debootstrap, with this machine's pip.

What stands for a base image is Debian's own root with its Python. Layers, image metadata and registries are not
modelled. Needs root. Only a test of the instructions: what comes out is never shipped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_cache_path

from deploy.config import ROOT
from tests.debian import SUITE, mirror
from tests.deploy.docker import dockerfiles
from tests.deploy.docker.dockerfiles import Dockerfile, Instruction, Stage

_START_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
_RUN_TIMEOUT_S = 1800
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


class CannotBuild(Exception):
    """Why there is no image, in one line."""


@dataclass
class Image:
    """A root folder with what the Dockerfile says of running it."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(_START_ENV))
    user: str = "0"
    folder: str = "/"
    labels: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)

    def run(
        self, *command: str, timeout_s: float = 120, environment: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        """As a pod of the chart does: the image's user, a read-only root, /tmp and HOME writable, no network but lo."""
        home = self.environment["HOME"]
        inside = [f"mount -t tmpfs -o mode=1777 none {self.root}/{path}" for path in ("tmp", "dev/shm", home)]
        # The runtime brings these.
        inside.append(f"echo 127.0.0.1 localhost > {self.root}/etc/hosts; : > {self.root}/etc/resolv.conf")
        inside.append(f"mount -o remount,bind,ro {self.root}")
        user, _, group = self.user.partition(":")
        identity = f"setpriv --reuid={user} --regid={group} --clear-groups --no-new-privs --inh-caps=-all"
        wanted = {**self.environment, **environment}
        pairs = shlex.join(f"{key}={value}" for key, value in wanted.items())
        script = f"cd {self.folder} && exec {identity} env -i {pairs} {shlex.join(command)}"
        return _in_root(self.root, script, inside, timeout_s, has_network=False)


@contextmanager
def work_folder() -> Iterator[Path]:
    """Room for stages: gigabytes, so not on a /tmp in memory. Others can enter it, as an image's files can be read."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="switchyard-image-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def base_root(packages: Sequence[str] = ()) -> Path:
    """Debian's smallest root, with packages, in the user's cache folder."""
    if os.getuid() != 0:
        raise CannotBuild("needs root")
    missing = [tool for tool in ("debootstrap", "unshare", "chroot", "setpriv") if shutil.which(tool) is None]
    if missing:
        raise CannotBuild(f"needs {', '.join(missing)}")
    if not mirror():
        raise CannotBuild(f"needs an apt that knows a mirror of Debian's {SUITE}")
    name = "-".join([SUITE, *packages])
    made = user_cache_path("switchyard") / "roots" / name
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        half = made.with_name(f"{name}.half")
        shutil.rmtree(half, ignore_errors=True)
        include = [f"--include={','.join(packages)}"] if packages else []
        command = ["debootstrap", "--variant=minbase", *include, SUITE, str(half), mirror()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_RUN_TIMEOUT_S)
        if done.returncode != 0:
            raise CannotBuild(f"debootstrap: {done.stdout.strip().splitlines()[-1]}")
        for left in ("var/lib/apt/lists", "var/cache/apt"):
            shutil.rmtree(half / left)
        half.rename(made)
    return made


def python_root() -> Path:
    """Stands for the python images: their Python and its headers are in /usr/local."""
    made = base_root(("python3", "python3-venv", "libpython3-dev", "ca-certificates"))
    for name in ("python", "python3"):
        link = made / "usr/local/bin" / name
        if not link.is_symlink():
            link.symlink_to("/usr/bin/python3")
    return made


def build(file: Dockerfile, base: Path, work: Path, arguments: Mapping[str, str] = {}) -> Image:
    """Carries out all stages; the last one's image. base: root that stands for the image of BASE."""
    images: dict[str, Image] = {}
    for number, stage in enumerate(file.stages):
        root = work / (stage.name or f"stage{number}")
        below = images.get(stage.base)
        lower = below.root if below else base
        subprocess.run(["cp", "-a", str(lower), str(root)], check=True)
        image = Image(root, dict(below.environment)) if below else Image(root)
        _carry_out(stage, image, images, arguments)
        images[stage.name] = image
    return image


def _carry_out(stage: Stage, image: Image, images: Mapping[str, Image], given: Mapping[str, str]) -> None:
    variables: dict[str, str] = {}
    for one in stage.instructions:
        text = dockerfiles.expanded(one.text, {**variables, **image.environment})
        filled = Instruction(one.word, text, one.line)
        if one.word == "ARG":
            name, _, default = one.text.partition("=")
            variables[name] = given.get(name, dockerfiles.unquoted(default))
        elif one.word == "ENV":
            image.environment |= dockerfiles.pairs_of(filled)
        elif one.word == "LABEL":
            image.labels |= dockerfiles.pairs_of(filled)
        elif one.word == "WORKDIR":
            image.folder = text
            (image.root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif one.word == "USER":
            image.user = text
        elif one.word == "ENTRYPOINT":
            image.entrypoint = dockerfiles.list_of(one)
        elif one.word == "COPY":
            _copy(filled, image, images)
        elif one.word == "RUN":
            _run(one, image, images, variables)


def _copy(instruction: Instruction, image: Image, images: Mapping[str, Image]) -> None:
    stage, sources, target = dockerfiles.copy_of(instruction)
    into = image.root / (target.lstrip("/") if target.startswith("/") else f"{image.folder}/{target}".lstrip("/"))
    if stage:
        (source,) = sources
        into.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", str(images[stage].root / source.lstrip("/")), str(into)], check=True)
        return
    sent = dockerfiles.sent_files(ROOT, (ROOT / ".dockerignore").read_text().splitlines())
    for source in sources:
        found = [path for path in sent if source == "." or path == Path(source) or Path(source) in path.parents]
        if not found:
            raise CannotBuild(f"COPY {source}: nothing is sent")
        for path in found:
            # The contents of a folder are copied, a file keeps its name.
            name = path.name if path == Path(source) else path.relative_to(source)
            made = into / name
            made.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, made)


def _run(instruction: Instruction, image: Image, images: Mapping[str, Image], variables: Mapping[str, str]) -> None:
    run = dockerfiles.run_of(instruction)
    binds = {Path("/etc/resolv.conf"): "/etc/resolv.conf"}
    environment = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    with tempfile.TemporaryDirectory() as folder:
        for mount in run.mounts:
            if mount.kind == "bind":
                binds[images[mount.stage].root / mount.source.lstrip("/")] = mount.target
            else:
                settings, named = _machines_pip(Path(folder) / "pip.conf")
                environment |= settings
                binds |= {path: str(path) for path in named} | {Path(folder) / "pip.conf": mount.target}
        with _bound(image.root, binds) as lines:
            wanted = {**image.environment, **variables, **environment}
            pairs = shlex.join(f"{key}={value}" for key, value in wanted.items())
            script = f"cd {image.folder} && exec env -i {pairs} /bin/sh -c {shlex.quote(run.command)}"
            done = _in_root(image.root, script, lines, _RUN_TIMEOUT_S)
    if done.returncode != 0:
        raise CannotBuild(f"line {instruction.line}: RUN {run.command[:80]}: {(done.stdout + done.stderr)[-1500:]}")


def _machines_pip(made: Path) -> tuple[dict[str, str], list[Path]]:
    """pip's settings on this machine: as a file, which is the secret of a real build, and in the environment.

    Also the folders and files of this machine that they name.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    said = subprocess.run(["python3", "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    settings = dict(re.findall(r"^global\.([\w-]+)='(.*)'$", said.stdout, re.M))
    settings.pop("constraint", None)  # each RUN has its own
    made.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    named = " ".join([*environment.values(), *settings.values()])
    # The pages of an index on disk link to files beside it.
    folders = [Path(path).parent for path in re.findall(r"file://(/[\w./-]+)", named)]
    paths = {*folders, *(Path(path) for path in re.findall(r"(?<![\w/:])/[\w./-]+", named))}
    return environment, sorted(path for path in paths if path.exists())


@contextmanager
def _bound(root: Path, binds: Mapping[Path, str]) -> Iterator[list[str]]:
    """Commands that mount them; what is made in the root as mount points is removed again."""
    lines, made = [], []
    for source, target in binds.items():
        path = root / target.lstrip("/")
        for folder in [*reversed(path.relative_to(root).parents)][1:]:
            if not (root / folder).exists():
                (root / folder).mkdir()
                made.append(root / folder)
        if not path.exists():
            made.append(path)
            path.mkdir() if source.is_dir() else path.touch()
        lines.append(f"mount --rbind {source.resolve()} {path}")
    yield lines
    for path in reversed(made):
        if path.is_file():
            path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()


def _in_root(
    root: Path, script: str, mounts: Sequence[str], timeout_s: float, has_network: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs a shell script there, in namespaces of its own that end with it."""
    lines = ["set -e", f"mount --bind {root} {root}", f"mount -t proc none {root}/proc"]
    lines.append(f"mount -t tmpfs -o mode=755 none {root}/dev")
    for name in _DEVICES:
        lines.append(f"touch {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}")
    lines += [f"mkdir {root}/dev/shm", f"ln -s /proc/self/fd {root}/dev/fd", *mounts]
    if not has_network:
        lines.append("ip link set lo up")
    lines.append(f"exec chroot {root} /bin/sh -c {shlex.quote(script)}")
    spaces = ["--mount", "--pid", "--fork", "--kill-child", *([] if has_network else ["--net"])]
    command = ["unshare", *spaces, "sh", "-c", "\n".join(lines)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL
    )
