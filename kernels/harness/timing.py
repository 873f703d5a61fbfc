"""How long a call takes on a device, and the two ceilings that it is judged against. Knows nothing of any operation.

On CUDA a graph of several launches is replayed, over inputs that together exceed the cache; on the CPU, which is there
to rehearse the same code, calls are timed one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_CACHE_BYTES = 180 << 20  # three times the L2 of an H100 or H200
_MIN_LAUNCHES, _MAX_SETS = 20, 32
_WARM_UPS = 3
_RUNS = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device reaches with nothing to compute, and with nothing to move."""

    device: str
    copy_bytes_per_s: float  # device to device; read and written bytes both count
    gemm_flops_per_s: float  # bf16 on CUDA, fp32 on the CPU

    def floor_s(self, memory_bytes: int, flops: int) -> float:
        """No implementation is much faster than this."""
        return max(memory_bytes / self.copy_bytes_per_s, flops / self.gemm_flops_per_s)


def num_sets_for(memory_bytes: int, device: str) -> int:
    """How many sets of inputs it takes that none is found in the cache."""
    return 1 if device == "cpu" else min(_MAX_SETS, -(-_CACHE_BYTES // max(1, memory_bytes)))


def seconds(calls: Sequence[Callable[[], object]], device: str) -> float:
    """Median time of one call; `calls` are the same call on different inputs, taken in turn."""
    return statistics.median(_on_cpu(calls) if device == "cpu" else _on_cuda(calls))


def _on_cpu(calls: Sequence[Callable[[], object]]) -> list[float]:
    calls[0]()
    took = []
    for i in range(_RUNS):
        began = time.perf_counter()
        calls[i % len(calls)]()
        took.append(time.perf_counter() - began)
    return took


def _on_cuda(calls: Sequence[Callable[[], object]]) -> list[float]:
    num_launches = -(-_MIN_LAUNCHES // len(calls)) * len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_launches):
            calls[i % len(calls)]()
    graph.replay()
    took = []
    for _ in range(_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end) / 1000 / num_launches)
    return took


def measure_ceilings(device: str) -> Ceilings:
    """A large copy and a large matrix product, through torch."""
    if device == "cpu":
        name, num_bytes, size, dtype = "CPU", 64 << 20, 1024, torch.float32
    else:
        name, num_bytes, size, dtype = torch.cuda.get_device_name(), 2 << 30, 8192, torch.bfloat16
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy_s = seconds([lambda: target.copy_(source)], device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    gemm_s = seconds([lambda: torch.mm(a, b, out=out)], device)
    return Ceilings(name, 2 * num_bytes / copy_s, 2 * size**3 / gemm_s)
