"""How long a call takes on a device, and the ceilings that it is judged against. Knows nothing of any operation.

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
_LONGEST_GRAPH_S = 0.1  # a slow call is launched fewer times, so that no case takes long
_WARM_UPS = 3
_RUNS = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device reaches with nothing to compute, and with nothing to move."""

    device: str
    copy_bytes_per_s: float  # device to device; read and written bytes both count
    gemm_flops_per_s: float  # bf16 on CUDA, fp32 on the CPU
    fp8_flops_per_s: float = 0.0  # torch._scaled_mm; 0 where it does not run
    int8_ops_per_s: float = 0.0  # torch._int_mm; 0 where it does not run

    def rate(self, unit: str) -> float:
        """Of products on a unit ("bf16", "fp8", "int8"); where its own was not measured, that of bf16."""
        measured = {"fp8": self.fp8_flops_per_s, "int8": self.int8_ops_per_s}
        return measured.get(unit, 0.0) or self.gemm_flops_per_s

    def floor_s(self, memory_bytes: int, flops: int, unit: str = "bf16") -> float:
        """No implementation is much faster than this."""
        return max(memory_bytes / self.copy_bytes_per_s, flops / self.rate(unit))


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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            for call in calls:
                call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        calls[0]()
        torch.cuda.synchronize()
        rounds = min(
            -(-_MIN_LAUNCHES // len(calls)), int(_LONGEST_GRAPH_S / (time.perf_counter() - began)) // len(calls)
        )
    num_launches = max(1, rounds) * len(calls)
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
    """A large copy, and large matrix products in every type that this device multiplies, through torch."""
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
    narrow_size = size if device == "cuda" else size // 4
    fp8_s = _seconds_of_narrow_product(torch.float8_e4m3fn, narrow_size, device)
    int8_s = _seconds_of_narrow_product(torch.int8, narrow_size, device)
    flops = 2 * size**3
    narrow_flops = 2 * narrow_size**3
    return Ceilings(name, 2 * num_bytes / copy_s, flops / gemm_s, narrow_flops / fp8_s, narrow_flops / int8_s)


def _seconds_of_narrow_product(dtype: torch.dtype, size: int, device: str) -> float:
    """Of a square product with fp8 (scales per row and column) or int8 operands; infinite where torch has none."""
    a, b = (torch.randn(size, size, device=device).mul_(16).round_().to(dtype) for _ in range(2))
    ones = torch.ones(size, 1, device=device)
    try:
        if dtype == torch.int8:
            return seconds([lambda: torch._int_mm(a, b.t())], device)
        return seconds(
            [
                lambda: torch._scaled_mm(
                    a, b.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True
                )
            ],
            device,
        )
    except (RuntimeError, NotImplementedError, AttributeError, ValueError):  # what torch says of an unsupported type
        return float("inf")
