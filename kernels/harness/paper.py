"""Compiles kernels for Hopper (sm_90a) on a machine without a GPU, through their own launchers.

A driver that has a target but no device makes `kernel[grid](...)` specialise its arguments and compile as a real call
would; the launch itself is left out. On meta tensors production shapes cost no memory. ptxas, cuobjdump and nvdisasm
come in Triton's wheel. For a process without TRITON_INTERPRET. Knows nothing of any operation.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_LIMIT_BYTES = 232_448  # what one block may use on sm_90; nobody checks it without a device


# The same for every block on sm_90.
_REGISTERS_PER_SM = 65_536
_SHARED_BYTES_PER_SM = 228 * 1024
_SYSTEM_SHARED_BYTES = 1024  # of each block, not counted in its own
_MAX_WARPS_PER_SM, _MAX_BLOCKS_PER_SM = 64, 32

# Instructions by the beginning of their name; a kernel's record counts those that it has.
_COUNTED = (
    "HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG.E.128", "STG.E.128",
    "LDL", "STL", "USETMAXREG", "SHFL", "MUFU", "ATOM",
)  # fmt: skip
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    name: str
    num_warps: int
    num_stages: int
    registers: int  # per thread
    local_bytes: int  # per thread, stack and local memory: above 0 means spills
    shared_bytes: int  # per block
    blocks_per_sm: int
    bytes_in_flight: int  # per SM: what its blocks may have asked memory for at one time
    sass: Mapping[str, int]

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= SHARED_MEMORY_LIMIT_BYTES


class _HopperOnPaper:
    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextlib.contextmanager
def compile_only() -> Iterator[list[Any]]:
    """Inside, launches compile and stop; yields the list of what they made. This process never reaches a GPU again."""
    launch: Any = JITFunction.run
    made: list[Any] = []

    def compile_and_stop(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made.append(launch(self, *args, grid=grid, warmup=True, **options))
        return made[-1]

    driver.set_active(_HopperOnPaper())
    JITFunction.run = compile_and_stop
    try:
        yield made
    finally:
        JITFunction.run = launch


def describe(compiled: Any) -> CompiledKernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    metadata = compiled.metadata
    registers = _resource(usage, "REG")
    blocks = blocks_per_sm(registers, metadata.shared, metadata.num_warps)
    return CompiledKernel(
        name=metadata.name,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=registers,
        local_bytes=_resource(usage, "STACK") + _resource(usage, "LOCAL"),
        shared_bytes=metadata.shared,
        blocks_per_sm=blocks,
        bytes_in_flight=blocks * _bytes_in_flight(code, metadata),
        sass=_count(code),
    )


def blocks_per_sm(registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many blocks of a kernel an SM holds at once; registers are given out 256 at a time to a warp."""
    registers_per_block = -(-registers * 32 // 256) * 256 * num_warps
    return min(
        _REGISTERS_PER_SM // max(1, registers_per_block),
        _SHARED_BYTES_PER_SM // (shared_bytes + _SYSTEM_SHARED_BYTES),
        _MAX_WARPS_PER_SM // num_warps,
        _MAX_BLOCKS_PER_SM,
    )


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _resource(usage: str, word: str) -> int:
    found = re.search(rf"\b{word}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump names no {word}: {usage}")
    return int(found[1])


def _count(code: str) -> dict[str, int]:
    names = [found[1] for found in _INSTRUCTION.finditer(code)]
    counts = {word: sum(name.startswith(word) for name in names) for word in _COUNTED}
    return {word: count for word, count in counts.items() if count}


def _bytes_in_flight(code: str, metadata: Any) -> int:
    """Of one block, an upper bound: what its shared-memory stages hold, or the loads of one stretch without a branch.

    By Little's law an SM of an H200 needs about 29 KB to keep its share of the memory busy.
    """
    staged = "LDGSTS" in code or "UTMALDG" in code
    in_stages = metadata.shared * max(1, metadata.num_stages - 1) // metadata.num_stages if staged else 0
    most = stretch = 0
    for found in _INSTRUCTION.finditer(code):
        name = found[1]
        if name.startswith("BRA"):
            stretch = 0
        elif name.startswith("LDG."):
            width = re.search(r"\.(8|U8|S8|16|U16|S16|64|128)\b", name)
            bits = int(width[1].lstrip("US")) if width else 32
            stretch += bits // 8 * 32 * metadata.num_warps
            most = max(most, stretch)
    return max(in_stages, most)
