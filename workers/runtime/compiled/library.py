"""Compiles traced code for this processor with Inductor, once, and keeps the libraries in the user's cache.

A library belongs to the code that it was made from, to torch's version and to the processor: change one of these, and
it is made anew. Without a C++ compiler, a home or a writable cache there is none. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from workers.runtime.compiled.choice import library_folder

log = logging.getLogger(__name__)

Run = Callable[[list[Tensor]], list[Tensor]]
_ROOT = Path(__file__).resolve().parents[3]
_SOURCES = ("kernels", "workers/model", "workers/kv/schemes", "workers/runtime/compiled")
_COMPILER = "g++"  # that Inductor calls
_UNUSED_S = 90 * 86400.0
_CPUINFO = Path("/proc/cpuinfo")


class NotCompiled(Exception):
    """There is no library, and why."""


@dataclass(frozen=True, slots=True)
class Traced:
    """Code to compile, and arguments of the shapes and types that it takes."""

    code: Callable[..., tuple[Tensor, ...]]
    arguments: Sequence[Tensor]
    num_with_rows: int
    """The first so many of the arguments have one row per token."""
    is_one_row: bool
    """Whether these have one row; otherwise any number."""
    is_dynamic: Sequence[bool]
    """Of the other arguments: whether the first dimension may be any."""


def compiled(description: Sequence[str], trace: Callable[[], Traced]) -> Run:
    """What is described, from the cache or compiled now. Raises NotCompiled."""
    name = xxhash.xxh3_128_hexdigest("\n".join((*description, _environment())))
    with _locked_folder() as folder:
        library = folder / f"{name}.so"
        with contextlib.suppress(NotCompiled):  # it is not there, or broken
            return _load(library)
        _tidy(folder)
        _make(trace(), library)
        return _load(library)


def _load(library: Path) -> Run:
    try:
        os.utime(library)  # it was used
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    except (OSError, RuntimeError) as error:
        raise NotCompiled(f"{library} cannot be loaded: {error}") from error
    return runner.run


def _tidy(folder: Path) -> None:
    """Remove what a killed process left, and libraries that nobody has used for months: of other code, for instance."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix == ".so" and time.time() - path.stat().st_mtime > _UNUSED_S:
            path.unlink()


def _make(traced: Traced, library: Path) -> None:
    if not shutil.which(_COMPILER):
        raise NotCompiled(f"there is no C++ compiler ({_COMPILER})")
    began_s = time.monotonic()
    try:
        from workers.runtime.compiled.inductor import compile_to  # imports for seconds

        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            package, unpacked = Path(folder) / "piece.pt2", Path(folder) / "piece.so"
            compile_to(package, traced)
            with zipfile.ZipFile(package) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(".so"))
                unpacked.write_bytes(archive.read(name))
            unpacked.replace(library)
    except Exception as error:  # whatever Inductor and the compiler say: steps run without it
        lines = str(error).strip().splitlines() or [""]
        raise NotCompiled(f"{type(error).__name__}: {lines[0][:300]}") from error
    log.info("compiled %s for this processor in %.0f s", library, time.monotonic() - began_s)


@contextlib.contextmanager
def _locked_folder() -> Iterator[Path]:
    """The cache, for one process at a time: the ranks and workers of a host start together, and one of them compiles.

    Its libraries are loaded into the process, so nobody else may be able to write there.
    """
    try:
        folder = library_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
        if state.st_uid != os.geteuid() or state.st_mode & 0o022:
            raise NotCompiled(f"{folder} could be written to by others")
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except (OSError, RuntimeError) as error:  # the latter: a user without a home, and without a name
        raise NotCompiled(f"no cache: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)


@cache
def _environment() -> str:
    """What compiled code depends on besides its description."""
    digest = xxhash.xxh3_128()
    for folder in _SOURCES:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    try:
        lines = set(_CPUINFO.read_text().splitlines())
        processor = "".join(sorted(line for line in lines if line.startswith(("flags", "Features", "model name"))))
    except OSError:
        processor = ""
    return f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {processor} {digest.hexdigest()}"
