"""A real `switchyard serve` in a process group of its own, with folders that a test can look into when it has ended."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

SWITCHYARD = str(Path(sys.executable).with_name("switchyard"))
PROMPT = "def walk(tree):\n    for name in sorted(tree):\n        yield name, tree[name]\n"
LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Surroundings:
    """Where clusters of a test keep their run folders and arenas: nothing else is in there."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.temp_dir = folder
        self.arenas = folder / "shm"
        self.arenas.mkdir()
        self._model = model

    def left(self) -> list[str]:
        """Names of run folders and arenas."""
        folders = [path.name for path in self.temp_dir.iterdir() if path != self.arenas]
        return sorted(folders) + sorted(path.name for path in self.arenas.iterdir())

    def command(self, *options: str, settings: Sequence[str] = ()) -> list[str]:
        """The command line of a cluster of two fake workers."""
        common = [
            "engine.runner=fake",
            "endpoints.grpc_port=0",
            "endpoints.http_port=0",
            f"ray.temp_dir={self.temp_dir}",
        ]
        common += [f"kvstore.arena_dir={self.arenas}", "kvstore.host_bytes=8388608", "ray.dashboard=false"]
        assignments = [part for setting in (*common, *settings) for part in ("--set", setting)]
        return [SWITCHYARD, "serve", "--json", "--model", str(self._model), *assignments, *options]


class Serving:
    """The process, and what it said when it was ready."""

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str] = {},
        is_ready: bool = True,
        on_terminal: bool = False,
    ) -> None:
        """on_terminal: one of its own, which close_terminal() closes."""
        self.stderr_path = cwd / f"stderr-{os.getpid()}-{id(self)}"
        with self.stderr_path.open("wb") as errors:
            ours, theirs = pty.openpty() if on_terminal else os.pipe()
            self.process = subprocess.Popen(
                ["setsid", "--ctty", *command] if on_terminal else command,
                stdin=theirs if on_terminal else subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs if on_terminal else errors,
                cwd=cwd,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=not on_terminal,
            )
        os.close(theirs)
        self._output = os.fdopen(ours, "rb", buffering=0)
        self.said: dict[str, Any] = {}
        if is_ready:
            self.said = self._read_ready()

    def _read_ready(self) -> dict[str, Any]:
        line = b" "
        while not line.startswith(b"{"):
            line = self._output.readline()
            assert line, f"serve ended: {self.stderr}"
        return dict(json.loads(line))

    def close_terminal(self) -> None:
        """Its reads and writes fail from then on; the kernel sends SIGHUP to the process in front."""
        self._output.close()

    @property
    def stderr(self) -> str:
        """All that it wrote there."""
        return self.stderr_path.read_text()

    @property
    def router(self) -> dict[str, Any]:
        """Addresses of the only router."""
        return dict(self.said["endpoints"]["routers"][0])

    def below(self) -> list[psutil.Process]:
        """All processes that it has started."""
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def signal_group(self, number: signal.Signals) -> None:
        """As a shell or `timeout` does."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL for everything at once."""
        for process in (psutil.Process(self.process.pid), *self.below()):
            process.suspend()  # nobody sees the others go
        for process in (*self.below(), psutil.Process(self.process.pid)):
            process.kill()
        self.process.wait(30)

    def close(self) -> None:
        """For tests that failed."""
        if self.process.poll() is None:
            self.kill()
        self._output.close()


class Stream(threading.Thread):
    """A streamed completion over HTTP that is read while the test does something else."""

    def __init__(self, router: Mapping[str, Any], num_tokens: int) -> None:
        super().__init__(daemon=True)
        self.lines: list[str] = []
        self.error: Exception | None = None
        self.has_begun = threading.Event()
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
        body["return_token_ids"] = True
        self._request = urllib.request.Request(
            f"http://{router['http']}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        self.start()
        assert self.has_begun.wait(30)

    def run(self) -> None:
        """Reads to the end."""
        try:
            with LOOPBACK.open(self._request, timeout=60) as answer:
                for line in answer:
                    self.lines.append(line.decode().strip())
                    self.has_begun.set()
        except Exception as error:
            self.error = error
        self.has_begun.set()

    @property
    def num_tokens(self) -> int:
        """Tokens that came; a chunk may have several, or a part of a character and no text."""
        chunks = [json.loads(line.removeprefix("data: ")) for line in self.lines if line.startswith("data: {")]
        return sum(len(choice.get("token_ids", ())) for chunk in chunks for choice in chunk["choices"])
