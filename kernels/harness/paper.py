"""Compiles kernels for Hopper (sm_90a) on a machine without a GPU, through their own launchers.

A driver that has a target but no device makes `kernel[grid](...)` specialise its arguments and compile as a real call
would; the launch itself is left out. On meta tensors production shapes cost no memory. ptxas and cuobjdump come in
Triton's wheel. For a process without TRITON_INTERPRET. Knows nothing of any operation.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_LIMIT_BYTES = 232_448  # what one block may use on sm_90; nobody checks it without a device


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    name: str
    num_warps: int
    registers: int  # per thread
    local_bytes: int  # per thread, stack and local memory: above 0 means spills
    shared_bytes: int  # per block
    uses_wgmma: bool

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
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout

    def resource(word: str) -> int:
        found = re.search(rf"\b{word}:(\d+)", usage)
        if found is None:
            raise ValueError(f"cuobjdump names no {word}: {usage}")
        return int(found[1])

    return CompiledKernel(
        name=compiled.metadata.name,
        num_warps=compiled.metadata.num_warps,
        registers=resource("REG"),
        local_bytes=resource("STACK") + resource("LOCAL"),
        shared_bytes=compiled.metadata.shared,
        uses_wgmma="wgmma.mma_async" in compiled.asm["ptx"],
    )
