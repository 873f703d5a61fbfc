"""What model.dtype=auto means on this host's processor: bfloat16 where that is faster, by a measurement.

It is made once, in a process of its own (torch takes seconds to import), and remembered for this processor and this
version of torch. A processor without arithmetic for bfloat16 is not measured: it would convert to float32 and back.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import platformdirs

from checkpoint.errors import CheckpointError
from checkpoint.tensors import FLOAT_DTYPES, is_gguf, stored_tensors

_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))  # of x86 and Arm, as Linux names them
_WORTH = 1.2  # times as fast
_MEASURING_TIMEOUT_S = 60.0
_ROUTER = ".mlp.gate.weight"
_CPUINFO = Path("/proc/cpuinfo")


def fastest_cpu_dtype(model_dir: Path, note: Callable[[str], None]) -> str:
    """bfloat16 or float32; a model that is stored in more than 16 bits keeps them. note: gets a line that says why."""
    processor = _processor()
    if processor is None or not _is_stored_in_16_bits(model_dir):
        return "float32"
    speed_up = _remembered(processor)
    if speed_up is None:
        speed_up = _measured(note)
        if speed_up is None:
            return "float32"
        _remember(processor, speed_up)
    chosen = "bfloat16" if speed_up >= _WORTH else "float32"
    note(f"model.dtype=auto: {chosen}; this processor multiplies {speed_up:.1f} times as fast in bfloat16")
    return chosen


def _processor() -> str | None:
    """Its name, and the version of torch; None where it has no arithmetic for bfloat16, or that is not known."""
    try:
        lines = _CPUINFO.read_text().splitlines()
        torch_version = importlib.metadata.version("torch")
    except (OSError, importlib.metadata.PackageNotFoundError):
        return None
    values: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        values.setdefault(name.strip(), value.strip())  # of the first core
    flags = _FLAGS.intersection(values.get("flags", values.get("Features", "")).split())
    if not flags:
        return None
    return f"{values.get('model name', 'unknown')}, torch {torch_version}, {' '.join(sorted(flags))}"


def _is_stored_in_16_bits(model_dir: Path) -> bool:
    """Or in fewer: then scales may have more."""
    try:
        stored = stored_tensors(model_dir)
    except CheckpointError:
        return False
    if {tensor.dtype for tensor in stored.values()} - set(FLOAT_DTYPES):
        return True
    wide = [(name, each) for name, each in stored.items() if each.dtype in ("F32", "F64")]
    # A GGUF has its norms and routers in 32 bits, whatever its matrices are stored in.
    return all(is_gguf(each.path) and (len(each.shape) == 1 or name.endswith(_ROUTER)) for name, each in wide)


def _measured(note: Callable[[str], None]) -> float | None:
    """None where the measurement fails."""
    command = [sys.executable, "-P", "-m", "workers.runtime.cpu_speed"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=_MEASURING_TIMEOUT_S, check=True)
        return float(json.loads(done.stdout)["speed_up"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        note(f"warning: model.dtype=auto: float32, since the processor's speed could not be measured: {error}")
        return None


def _memory() -> Path:
    return platformdirs.user_cache_path("switchyard", appauthor=False) / "cpu-speed.json"


def _remembered(processor: str) -> float | None:
    try:
        content = json.loads(_memory().read_text())
        return float(content["speed_up"]) if content["processor"] == processor else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: a user without a home
        return None


def _remember(processor: str, speed_up: float) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        memory = _memory()
        memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = memory.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({"processor": processor, "speed_up": speed_up}))
        written.replace(memory)
