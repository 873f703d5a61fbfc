"""Pieces that the matrix products share: the order of output tiles, adding up shares of a sum over k, widening e4m3.

Knows nothing of any one product.
"""

from __future__ import annotations

from functools import cache

import torch

from kernels.jit import Value, cdiv, constexpr, jit, tl


@jit
def tile_at(index: Value, num_m: Value, num_n: Value, GROUP_M: constexpr) -> Value:
    """Tile number -> (m, n): a few rows of tiles at a time, so that neighbours in time share operands in the L2."""
    group = index // (GROUP_M * num_n)
    height = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    within = index % (GROUP_M * num_n)
    return group * GROUP_M + within % height, within // height


@jit
def _add_shares_kernel(
    out_ptr: Value,  # [tokens, n]
    part_ptr: Value,  # [SHARES, tokens, n] fp32
    bias_ptr: Value,
    num_elements: Value,  # tokens * n
    n: Value,
    SHARES: constexpr,
    HAS_BIAS: constexpr,
    BLOCK: constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    for index in tl.static_range(SHARES):
        total += tl.load(part_ptr + index * num_elements + at, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def add_shares(out: torch.Tensor, parts: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """out [tokens, n] = the sum of parts [shares, tokens, n] in their order, plus bias: the same bits every time."""
    num_elements = out.numel()
    block = 1024 if num_elements >= 1 << 18 else 256
    _add_shares_kernel[(cdiv(num_elements, block),)](
        out, parts, parts if bias is None else bias, num_elements, out.shape[1],
        SHARES=parts.shape[0], HAS_BIAS=bias is not None, BLOCK=block, num_warps=block // 256,
    )  # fmt: skip


@cache
def _e4m3_values() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU: a contiguous tensor in fp32. e4m3 by a table of its 256 values, in a tenth of torch's time."""
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor.float()
    return _e4m3_values().index_select(0, tensor.view(torch.uint8).view(-1).int()).view(tensor.shape)
