"""16-bit activations times weights of 4 or 8 bits with a scale per group along k: the kernel and its launch.

It computes the product turned over, out^T = W x^T: then the weights are the tensor core's first operand, which may lie
in registers, where they were decoded, and a few tokens are its narrow side instead of padding its wide one. Knows
nothing of layouts but that a step gives `lanes` neighbouring k.
"""

from __future__ import annotations

import torch

from kernels.gemm.codes4 import Table, decoded
from kernels.gemm.codes8 import decoded8
from kernels.gemm.tile import add_shares
from kernels.jit import Value, cdiv, constexpr, jit, tl
from kernels.tuning import config_for


@jit
def _weight_only_kernel(
    out_ptr: Value,  # [tokens, n]; in fp32 and [shares, tokens, n] where SPLIT
    x_ptr: Value,  # [tokens, k]
    packed_ptr: Value,
    scales_ptr: Value,
    zeros_ptr: Value,  # read only where HAS_ZEROS
    offsets_ptr: Value,  # read only where HAS_OFFSETS
    num_tokens: Value,
    n: Value,
    num_blocks: Value,
    share: Value,  # blocks for one program
    stride_x: Value,
    CODES: constexpr,  # in a word: 4 of 4 bits, 2 of 8
    LANES: constexpr,
    GROUP: constexpr,
    HAS_ZEROS: constexpr,
    HAS_OFFSETS: constexpr,  # then the weights are scaled
    TABLE: constexpr,
    SPLIT: constexpr,
    SCALE_WEIGHTS: constexpr,  # scale each weight: no second accumulator. Otherwise scale each group's sum
    ASM: constexpr,  # empty in the interpreter, which knows no assembly
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANES)
    # Rows and columns behind the end read the last one again: no mask in the loop, and they are not stored.
    x_rows = x_ptr + tl.minimum(row, num_tokens - 1).to(tl.int64)[None, :] * stride_x
    in_reach = tl.minimum(column, n - 1)
    words = in_reach[:, None] * LANES + lane[None, :]
    dtype = x_ptr.dtype.element_ty
    # What a decoder wants added to the zero point.
    added: tl.constexpr = 1024 if dtype != tl.bfloat16 else (128 if CODES == 4 else 0)
    symmetric: tl.constexpr = added + (8 if CODES == 4 else 128)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(2) * share
    block_ptr = packed_ptr + first.to(tl.int64) * n * LANES
    for block in range(first, tl.minimum(first + share, num_blocks)):
        word = tl.load(block_ptr + words)
        block_ptr += n * LANES
        for group in tl.static_range(CODES * LANES // GROUP):
            at = (block * (CODES * LANES // GROUP) + group) * n + in_reach
            scale = tl.load(scales_ptr + at)
            if HAS_ZEROS:
                zero = (tl.load(zeros_ptr + at).to(tl.float32) + added).to(dtype)
            else:
                zero = tl.full([BLOCK_N], symmetric, tl.float32).to(dtype)
            zero = tl.broadcast_to(zero[:, None], [BLOCK_N, LANES])
            if HAS_OFFSETS:
                offset = tl.load(offsets_ptr + at)
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for step in tl.static_range(GROUP // LANES):
                x = tl.load(x_rows + (block * CODES * LANES + group * GROUP + step * LANES + lane)[:, None])
                if CODES == 4:
                    w = decoded(word, zero, group * (GROUP // LANES) + step, TABLE, ASM)
                else:
                    w = decoded8(word, zero, group * (GROUP // LANES) + step, ASM)
                if SCALE_WEIGHTS:
                    w *= scale[:, None]
                    if HAS_OFFSETS:
                        w += offset[:, None]
                    acc = tl.dot(w, x, acc)
                else:
                    part = tl.dot(w, x, part)
            if not SCALE_WEIGHTS:
                acc += part * scale.to(tl.float32)[:, None]
    mask = (column < n)[:, None] & (row < num_tokens)[None, :]
    at_out = row.to(tl.int64)[None, :] * n + column[:, None]
    if SPLIT:
        at_out += tl.program_id(2).to(tl.int64) * num_tokens * n
    tl.store(out_ptr + at_out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    offsets: torch.Tensor | None,
    table: Table | None,
    codes_per_word: int,
    asm: tuple[str, ...],
    configs: str,
) -> torch.Tensor:
    num_tokens, k = x.shape
    num_blocks, n, lanes = packed.shape
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    config = config_for(configs, m=num_tokens, n=n, k=k)
    block_m, block_n = config["block_m"], config["block_n"]
    group = k // scales.shape[0]
    share = cdiv(num_blocks, config["shares"])
    shares = cdiv(num_blocks, share)
    sums = out if shares == 1 else torch.empty(shares, num_tokens, n, dtype=torch.float32, device=x.device)
    _weight_only_kernel[(cdiv(num_tokens, block_m), cdiv(n, block_n), shares)](
        sums, x, packed, scales, packed if zeros is None else zeros, scales if offsets is None else offsets,
        num_tokens, n, num_blocks, share, x.stride(0),
        CODES=codes_per_word, LANES=lanes, GROUP=group, HAS_ZEROS=zeros is not None, HAS_OFFSETS=offsets is not None,
        TABLE=table, SPLIT=shares > 1, SCALE_WEIGHTS=block_m >= 128 or group < 64 or offsets is not None, ASM=asm,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    if shares > 1:
        add_shares(out, sums)
    return out
