"""Benchmark rows: one JSON object a line, appended, each with what is needed to judge it."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One quantity, its runs, and what it stands beside."""

    name: str  # "serve.ttft"
    unit: str  # "s", "tokens/s", "GB/s"
    runs: Sequence[float]
    setting: dict[str, object] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)  # limits and peers of the same run, in the same unit

    @property
    def median(self) -> float:
        """The figure."""
        return statistics.median(self.runs)


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+changes" if git("status", "--porcelain", "-uno", "--", ".", ":!bench/results") else ""
    )


def _hardware() -> str:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    cores = sum(line.startswith("processor") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return f"{cpu}, {cores} cores, {'with' if Path('/dev/nvidia0').exists() else 'no'} GPU"


def append_rows(file_name: str, measurements: Sequence[Measurement], command: str) -> Path:
    """Append one row per measurement to bench/results/FILE; returns the file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command,
        "commit": _commit(),
        "hardware": _hardware(),
        "versions": {name: metadata.version(name) for name in ("torch", "grpcio", "numpy")}
        | {"python": platform.python_version()},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = RESULTS / file_name
    with path.open("a", encoding="utf-8") as out:
        for m in measurements:
            row = {**asdict(m), "median": m.median, "min": min(m.runs), "max": max(m.runs), **about}
            out.write(json.dumps(row) + "\n")
    return path
