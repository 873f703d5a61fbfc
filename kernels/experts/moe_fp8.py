"""The expert layer of `kernels.experts.moe` in e4m3 with a scale per block: DeepSeek-V3's format.

    x               [tokens, hidden] e4m3, with x_scales [tokens, hidden / 128] fp32
    gate_up         [experts, 2 * width, hidden] e4m3, gate_up_scales [experts, 2 * width / 128, hidden / 128] fp32
    down            [experts, hidden, width] e4m3, down_scales [experts, hidden / 128, width / 128] fp32
    expert_ids, weights, out: as in `kernels.experts.moe`; out is bf16. hidden and width are multiples of 128.

A program of the first product owns 128 columns of the gated activations, so that it can round them to e4m3 itself, a
scale per row: they go to memory once, in 8 bits. Each 128 of k is summed by the tensor core from zero, and scaled and
added outside it. Always out^T = W x^T, at most 64 rows at a time: four sums of 128 x 64 are what registers hold. Knows
nothing of routers or ranks.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import Draw
from kernels.experts.grouping import draw_ids, group_rows
from kernels.experts.moe import UNGROUPED_UP_TO_ROWS, sum_rows
from kernels.gemm.fp8_block import SCALE_BLOCK, scaled
from kernels.gemm.tile import widened
from kernels.jit import Value, box, cdiv, constexpr, jit, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for

_LARGEST = 448.0  # of e4m3
_LEAST_SCALE = 1e-12


@jit
def _experts_fp8_kernel(
    out_ptr: Value,  # [rows, WIDTH]; e4m3 where GATED
    out_scales_ptr: Value,  # [rows, WIDTH / 128]; written where GATED
    x_ptr: Value,  # [rows / ROWS_PER_X, k]
    x_scales_ptr: Value,
    matrices: Value,  # boxes [BLOCK_N, 128] of [experts * WIDTH, k]; [experts * 2 WIDTH, k] where GATED
    scales_ptr: Value,  # of the matrices
    weights_ptr: Value,  # [rows] fp32; not read where GATED
    rows_ptr: Value,
    experts_ptr: Value,
    num_rows: Value,
    width: Value,
    num_steps: Value,  # k / 128
    stride_x: Value,
    stride_row: Value,  # of x_scales
    stride_step: Value,
    ROWS_PER_X: constexpr,
    GATED: constexpr,
    UNGROUPED: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,  # at most 128; 128 where GATED
) -> None:
    block = tl.program_id(1)
    expert = tl.load(experts_ptr + block)
    if expert < 0:
        return
    lane = tl.arange(0, BLOCK_M)
    row = tl.where(lane == 0, block, num_rows) if UNGROUPED else tl.load(rows_ptr + block * BLOCK_M + lane)
    source = tl.minimum(row, num_rows - 1) // ROWS_PER_X
    depth = tl.arange(0, 128)
    x_ptrs = x_ptr + source.to(tl.int64)[None, :] * stride_x + depth[:, None]
    x_scale_ptrs = x_scales_ptr + source * stride_row
    first_column = tl.program_id(0) * BLOCK_N
    first_row = expert * (2 * width if GATED else width) + first_column
    scale_ptr = scales_ptr + (first_row // 128).to(tl.int64) * num_steps
    up_scale_ptr = scale_ptr + (width // 128) * num_steps
    first = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(num_steps):
        x = tl.load(x_ptrs + step * 128)
        x_scale = tl.load(x_scale_ptrs + step * stride_step)
        w = matrices.load([first_row, step * 128])
        first += tl.dot(w, x) * (x_scale * tl.load(scale_ptr + step))[None, :]
        if GATED:
            w = matrices.load([first_row + width, step * 128])
            second += tl.dot(w, x) * (x_scale * tl.load(up_scale_ptr + step))[None, :]
    is_row = row < num_rows
    column = first_column + tl.arange(0, BLOCK_N)
    ptrs = out_ptr + row.to(tl.int64)[None, :] * width + column[:, None]
    mask = is_row[None, :] & (column < width)[:, None]
    if GATED:
        out = first / (1.0 + tl.exp(-first)) * second
        scale = tl.maximum(tl.max(tl.abs(out), 0) / 448.0, 1e-12)
        tl.store(out_scales_ptr + row * (width // 128) + tl.program_id(0), scale, mask=is_row)
        out = out / scale[None, :]
    else:
        out = first * tl.load(weights_ptr + row, mask=is_row, other=0.0)[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    x_scales: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_scales: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    num_tokens, hidden = x.shape
    num_experts, _, width = down.shape
    top_k = expert_ids.shape[1]
    num_rows = num_tokens * top_k
    out = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=x.device)
    if num_tokens == 0:
        return out
    config = config_for("moe_experts_fp8", tokens=num_tokens, experts=num_experts, width=width, hidden=hidden)
    block_m = config["block_m"]
    ungrouped = num_rows <= UNGROUPED_UP_TO_ROWS
    rows, block_experts = (expert_ids, expert_ids) if ungrouped else group_rows(expert_ids, num_experts, block_m)
    blocks = num_rows if ungrouped else block_experts.numel()
    gated = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    gated_scales = torch.empty(num_rows, width // SCALE_BLOCK, dtype=torch.float32, device=x.device)
    parts = torch.empty(num_rows, hidden, dtype=torch.bfloat16, device=x.device)
    for target, source, source_scales, matrix, matrix_scales, rows_per_x in (
        (gated, x, x_scales, gate_up, gate_up_scales, top_k),
        (parts, gated, gated_scales, down, down_scales, 1),
    ):
        out_width, k = target.shape[1], source.shape[1]
        block_n = SCALE_BLOCK if target is gated else config["down_block_n"]
        _experts_fp8_kernel[(cdiv(out_width, block_n), blocks)](
            target, gated_scales, source, source_scales, box(matrix.view(-1, k), [block_n, SCALE_BLOCK]),
            matrix_scales, weights, rows, block_experts, num_rows, out_width, k // SCALE_BLOCK,
            source.stride(0), source_scales.stride(0), source_scales.stride(1),
            ROWS_PER_X=rows_per_x, GATED=target is gated, UNGROUPED=ungrouped, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    sum_rows(out, parts, expert_ids)
    return out


def _layer(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    x_scales: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_scales: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Everything in `dtype`, but for the gated activations, which are rounded to e4m3 as the format has it."""
    wide_x = scaled(_wide(x, dtype), x_scales, 1)
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for expert in expert_ids.unique().tolist():
        if expert < 0:
            continue
        token, k = (expert_ids == expert).nonzero().unbind(1)
        matrix = scaled(_wide(gate_up[expert], dtype), gate_up_scales[expert], SCALE_BLOCK)
        gate, up = (wide_x[token] @ matrix.T).chunk(2, dim=-1)
        gated = (gate * torch.sigmoid(gate) * up).view(len(token), -1, SCALE_BLOCK)
        scales = (gated.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=_LEAST_SCALE)
        rounded = (gated / scales).to(torch.float8_e4m3fn).to(dtype) * scales
        matrix = scaled(_wide(down[expert], dtype), down_scales[expert], SCALE_BLOCK)
        out.index_add_(0, token, rounded.flatten(1) @ matrix.T * weights[token, k, None].to(dtype))
    return out.bfloat16()


def _wide(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_cuda else widened(tensor).to(dtype)


def reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    x_scales: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_scales: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    return _layer(
        x, gate_up, down, x_scales, gate_up_scales, down_scales, expert_ids, weights, torch.float64
    )  # fmt: skip


def cpu(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    x_scales: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_scales: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    return _layer(
        x, gate_up, down, x_scales, gate_up_scales, down_scales, expert_ids, weights, torch.float32
    )  # fmt: skip


def _cost(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    x_scales: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_scales: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> OpCost:
    here = expert_ids[expert_ids >= 0]
    return costs.moe_experts_fp8(x.shape[0], here.numel(), here.unique().numel(), x.shape[1], down.shape[2])


def _case(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    width: int,
    *,
    num_absent: int = 0,
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, ...]:
        draw = Draw(device, FP8)
        here = num_experts - num_absent
        steps, columns = hidden // SCALE_BLOCK, width // SCALE_BLOCK
        x, gate_up = draw.normal(num_tokens, hidden), draw.normal(here, 2 * width, hidden)
        down = draw.normal(here, hidden, width)
        x_scales, gate_up_scales, down_scales = (
            draw.normal(*shape, dtype=torch.float32).abs_().add_(0.1).mul_(shape[-1] ** -0.5 * 0.1)
            for shape in ((num_tokens, steps), (here, 2 * columns, steps), (here, steps, columns))
        )
        ids = draw_ids(draw, num_tokens, top_k, num_experts, num_absent)
        weights = draw.normal(num_tokens, top_k, dtype=torch.float32).softmax(dim=-1)
        return x, gate_up, down, x_scales, gate_up_scales, down_scales, ids, weights

    name = f"fp8 {num_tokens} tokens top{top_k} of {num_experts} {hidden}x{width}{' others away' * bool(num_absent)}"
    return Case(name, FP8, build, ("QGMMA", "UTMALDG"), target)


FP8 = torch.float8_e4m3fn

SMALL = (
    _case(3, 2, 4, 128, 256),
    _case(20, 2, 3, 256, 128),  # grouped
    _case(2, 3, 6, 128, 128, num_absent=3),
    _case(90, 1, 2, 128, 128),  # more rows than one block
)
FULL = (
    _case(1, 8, 256, 7168, 2048, num_absent=224),
    _case(128, 8, 256, 7168, 2048, num_absent=224, target=Target(0.85, "memory")),
    _case(4096, 8, 256, 7168, 2048, num_absent=224),
    _case(64, 8, 128, 2048, 768),
)

LIMIT = (
    "Memory up to a few rows per expert: weights come in boxes of 16 KB, two at a time where gated. Above, four sums "
    "of 128x64 in 8 warps, and the wait for each product before it is scaled, as in fp8_block_gemm."
)

# The gated activations are rounded to e4m3 in between; a value at a tie may fall to its other side.
moe_experts_fp8 = Op(
    "moe_experts_fp8", reference, launch, cpu, _cost, SMALL, FULL, tolerance={FP8: 2.4e-2}, limit=LIMIT
)
