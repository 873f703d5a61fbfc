"""How much faster this processor multiplies in bfloat16 than in float32: `python -m workers.runtime.cpu_speed`.

Prints one JSON object {"speed_up": ...}: the smaller of the speed-ups at one row, where memory decides, and at many,
where arithmetic does. Medians, so that a busy machine gives about the same answer.
"""

from __future__ import annotations

import json
import statistics
import time

import torch

from workers.model.arithmetic import Arithmetic, Product
from workers.parallel import ParallelGroups, Shard

_WIDTH = 2048  # a matrix of 16 MiB in float32: more than most caches
_ROWS = (1, 64)
_RUNS = 9


def speed_up() -> float:
    """Of packed products in bfloat16 over those in float32, on one thread."""
    torch.set_num_threads(1)
    arithmetic = Arithmetic(ParallelGroups(Shard(), torch.device("cpu")))
    weight = torch.randn(_WIDTH, _WIDTH)
    ratios = []
    with torch.inference_mode():
        for rows in _ROWS:
            x, took_s = torch.randn(rows, _WIDTH), {}
            for dtype in (torch.float32, torch.bfloat16):
                product, input_ = arithmetic.product(weight.to(dtype)), x.to(dtype)
                product(input_)
                took_s[dtype] = statistics.median(_seconds(product, input_) for _ in range(_RUNS))
            ratios.append(took_s[torch.float32] / took_s[torch.bfloat16])
    return min(ratios)


def _seconds(product: Product, x: torch.Tensor) -> float:
    began_s = time.perf_counter()
    product(x)
    return time.perf_counter() - began_s


if __name__ == "__main__":
    print(json.dumps({"speed_up": round(speed_up(), 2)}))
