"""A real kube-apiserver and its etcd, built once from Debian's packages into the user's cache folder.

Debian 12 has the complete source of Kubernetes 1.20.2 with everything that it needs, so no module proxy is asked. Go
1.15 is Debian 11's: programs that later releases of Go make of this source crash. apt works in a folder of its own;
the machine's lists and packages stay as they are. Nothing of it goes into the repository.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from tests.debian import mirror

VERSION = "1.20.2"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_NEEDED = ("apt-get", "dpkg", "tar", "gzip")
_BUILD_TIMEOUT_S = 3600
_PACKAGE = "k8s.io/kubernetes"
_OPENAPI = f"{_PACKAGE}/pkg/generated/openapi"
_TAG = "+k8s:openapi-gen="
_NOT_SERVED = ("code-generator", "sample-apiserver", "sample-controller", "sample-cli-plugin")


class CannotBuild(Exception):
    """Why there is no server, in one line."""


@dataclass(frozen=True)
class Binaries:
    """What runs."""

    kube_apiserver: Path
    etcd: Path


def binaries() -> Binaries:
    """The programs; built if they are not in the cache yet, which takes minutes."""
    folder = user_cache_path("switchyard") / f"kube-apiserver-{VERSION}"
    found = Binaries(folder / "kube-apiserver", folder / "etcd")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotBuild(f"no cache folder: {error}") from None
    with _one_at_a_time(folder):
        if not (found.kube_apiserver.exists() and found.etcd.exists()):
            _build(folder, found)
    return found


def _build(folder: Path, made: Binaries) -> None:
    missing = [tool for tool in _NEEDED if shutil.which(tool) is None]
    if missing or not Path(_KEYRING).exists():
        raise CannotBuild(f"needs a Debian with {', '.join(missing) or _KEYRING}")
    if os.uname().machine != "x86_64":
        raise CannotBuild("has only been tried on x86_64")
    if not mirror():
        raise CannotBuild("needs an apt that knows a mirror of Debian")
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    log = folder / "build.log"
    log.write_text("")
    run = _Commands(log, time.monotonic() + _BUILD_TIMEOUT_S)
    packages = _download(run, work)
    tree = _unpack(run, work, packages)
    _compile(run, work, tree, made.kube_apiserver)
    shutil.move(work / "root/usr/bin/etcd", made.etcd)
    shutil.rmtree(work, ignore_errors=True)  # more than a gigabyte


@dataclass(frozen=True)
class _Commands:
    """Runs commands, with what they print in a log, until a common deadline."""

    log: Path
    deadline: float

    def __call__(self, *command: str, cwd: Path, env: dict[str, str] | None = None) -> None:
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)[:500]}\n")
            log.flush()
            left = max(1.0, self.deadline - time.monotonic())
            environment = {**os.environ, **(env or {})}
            try:
                done = subprocess.run(
                    command, cwd=cwd, env=environment, stdout=log, stderr=log, timeout=left, check=False
                )
            except subprocess.TimeoutExpired:
                raise CannotBuild(f"{command[0]} took too long; see {self.log}") from None
        if done.returncode != 0:
            last = (self.log.read_text().strip().splitlines() or [""])[-1]
            raise CannotBuild(f"{Path(command[0]).name} {command[1]} failed: {last[:200]}; see {self.log}")


def _download(run: _Commands, work: Path) -> Path:
    """The folder with the source and the packages."""
    state, packages = work / "apt", work / "packages"
    for made in (state / "lists/partial", state / "archives/partial", state / "parts", packages):
        made.mkdir(parents=True)
    lines = [("deb", "bookworm"), ("deb-src", "bookworm"), ("deb", "bullseye")]
    sources = state / "sources.list"
    sources.write_text("".join(f"{kind} [signed-by={_KEYRING}] {mirror()} {suite} main\n" for kind, suite in lines))
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": state / "parts",
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state,
        "Dir::Cache::archives": state / "archives",
    }
    if os.getuid() == 0:
        options["APT::Sandbox::User"] = Path("root")  # the usual user cannot write to this folder
    apt = ["apt-get", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
    run(*apt, "update", cwd=packages)
    run(*apt, "source", "--download-only", "kubernetes", cwd=packages)
    run(*apt, "download", "golang-1.15-go", "golang-1.15-src", "etcd-server", cwd=packages)
    return packages


def _unpack(run: _Commands, work: Path, packages: Path) -> Path:
    """The source tree where GOPATH has it."""
    source = next(packages.glob(f"kubernetes_*{VERSION}.orig.tar.*"), None)
    if source is None:
        found = ", ".join(sorted(path.name for path in packages.glob("kubernetes_*.dsc")))
        raise CannotBuild(f"Debian has another version: {found or 'no source'}")
    for package in sorted(packages.glob("*.deb")):
        run("dpkg", "-x", str(package), str(work / "root"), cwd=work)
    tree = work / "gopath/src" / _PACKAGE
    tree.mkdir(parents=True)
    run("tar", "xf", str(source), "-C", str(tree), "--strip-components=1", cwd=work)
    return tree


def _compile(run: _Commands, work: Path, tree: Path, made: Path) -> None:
    go = str(work / "root/usr/lib/go-1.15/bin/go")
    environment = {
        "GOROOT": str(work / "root/usr/lib/go-1.15"),
        "GOPATH": str(work / "gopath"),
        "GOCACHE": str(work / "gocache"),
        "GO111MODULE": "off",
        "CGO_ENABLED": "0",
        "GOFLAGS": "",
    }
    generator = str(work / "openapi-gen")
    run(
        go, "build", "-o", generator, f"{_PACKAGE}/vendor/k8s.io/kube-openapi/cmd/openapi-gen",
        cwd=tree, env=environment,
    )  # fmt: skip
    # The one generated file that the source does not have.
    inputs = ",".join(f"{_PACKAGE}/{folder}" for folder in _tagged(tree))
    run(
        generator, "--logtostderr", "-i", inputs, "-p", _OPENAPI, "-O", "zz_generated.openapi",
        "-h", "vendor/k8s.io/code-generator/hack/boilerplate.go.txt", "-r", str(work / "violations"),
        cwd=tree, env=environment,
    )  # fmt: skip
    stamp = {"gitVersion": f"v{VERSION}", "gitMajor": "1", "gitMinor": "20"}
    flags = " ".join(
        f"-X {_PACKAGE}/vendor/k8s.io/{package}.{key}={value}"
        for package in ("component-base/version", "client-go/pkg/version")
        for key, value in stamp.items()
    )
    server = work / "kube-apiserver"
    run(go, "build", "-ldflags", flags, "-o", str(server), f"{_PACKAGE}/cmd/kube-apiserver", cwd=tree, env=environment)
    shutil.move(server, made)


def _tagged(tree: Path) -> list[str]:
    """The packages that ask for an OpenAPI description, as Kubernetes' Makefile finds them."""
    vendored = [path for path in sorted((tree / "vendor/k8s.io").iterdir()) if path.name not in _NOT_SERVED]
    return sorted({str(path.parent.relative_to(tree)) for top in [tree / "pkg", *vendored] for path in _asking(top)})


def _asking(top: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(top):
        for name in names:
            path = Path(folder, name)
            if name.endswith(".go") and not name.endswith("_test.go") and "testdata" not in path.parts:
                text = path.read_text(errors="replace")
                if any(line.startswith("//") and _TAG in line for line in text.splitlines()):
                    yield path


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
