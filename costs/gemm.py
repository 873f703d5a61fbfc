"""Bytes and flops of matrix products with weights and of expert layers, from shapes alone.

As in `costs.ops`: the least traffic that any implementation can do, a multiply-add counts as two flops. Knows nothing
of devices.
"""

from __future__ import annotations

from costs.ops import OpCost


def linear(num_tokens: int, n: int, k: int, dtype_bytes: int) -> OpCost:
    """x [num_tokens, k] times weight [n, k], everything in one dtype."""
    return OpCost((num_tokens * (k + n) + n * k) * dtype_bytes, 2 * num_tokens * n * k)
