"""Mixture of experts: the chosen experts' gated projections and their weighted sum.

    x            [tokens, hidden]
    gate_up      [experts, 2 * width, hidden]; an expert's gate rows stand before its up rows
    down         [experts, hidden, width]
    expert_ids   [tokens, top_k] int32; a negative one is an expert of another rank and adds nothing here
    weights      [tokens, top_k] fp32
    out          [tokens, hidden]: of each token, sum over k of weights * down(silu(gate(x)) * up(x))

A row is one (token, k), numbered token * top_k + k; `kernels.experts.grouping` gives every expert whole blocks of rows.
Grids follow shapes alone, as if every block were used; a program of an unused block ends at once. Row results are
written once each and summed over k in order, so that the same call gives the same bits.

Few tokens per expert are the tensor core's narrow side (out^T = W x^T). For a handful of rows grouping would cost more
than it saves: each row is then a block of its own. Knows nothing of routers or ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.experts.grouping import draw_ids, group_rows
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for

UNGROUPED_UP_TO_ROWS = 32
_TURN_UP_TO_BLOCK = 64


@jit
def _experts_kernel(
    out_ptr: Value,  # [rows, WIDTH]
    x_ptr: Value,  # [rows / ROWS_PER_X, k]
    matrix_ptr: Value,  # [experts, WIDTH, k]; [experts, 2 WIDTH, k] where GATED
    weights_ptr: Value,  # [rows] fp32; not read where GATED
    rows_ptr: Value,  # a row per slot; not read where UNGROUPED
    experts_ptr: Value,  # an expert per block
    num_rows: Value,
    width: Value,
    k: Value,
    stride_x: Value,
    ROWS_PER_X: constexpr,
    GATED: constexpr,  # silu(gate) * up; otherwise times the row's weight
    UNGROUPED: constexpr,  # block i is row i alone
    TURNED: constexpr,
    EVEN_K: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
) -> None:
    block = tl.program_id(1)
    expert = tl.load(experts_ptr + block)
    if expert < 0:
        return
    lane = tl.arange(0, BLOCK_M)
    row = tl.where(lane == 0, block, num_rows) if UNGROUPED else tl.load(rows_ptr + block * BLOCK_M + lane)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Unused slots and columns behind the end read others' again: no mask in the loop, and they are not stored.
    x_at = (tl.minimum(row, num_rows - 1) // ROWS_PER_X).to(tl.int64) * stride_x
    column_at = tl.minimum(column, width - 1) * k
    x_base = x_ptr + (x_at[None, :] if TURNED else x_at[:, None])
    matrix = matrix_ptr + expert.to(tl.int64) * (2 * width * k if GATED else width * k)
    first_base = matrix + (column_at[:, None] if TURNED else column_at[None, :])
    second_base = first_base + width * k
    first = tl.zeros([BLOCK_N, BLOCK_M] if TURNED else [BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M] if TURNED else [BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + depth
        x_depth = at[:, None] if TURNED else at[None, :]
        w_depth = at[None, :] if TURNED else at[:, None]
        x = tl.load(x_base + x_depth) if EVEN_K else tl.load(x_base + x_depth, mask=x_depth < k, other=0.0)
        first = _add_product(first, x, first_base + w_depth, w_depth < k, TURNED, EVEN_K)
        if GATED:
            second = _add_product(second, x, second_base + w_depth, w_depth < k, TURNED, EVEN_K)
    if GATED:
        out = first / (1.0 + tl.exp(-first)) * second
    else:
        weight = tl.load(weights_ptr + row, mask=row < num_rows, other=0.0)
        out = first * (weight[None, :] if TURNED else weight[:, None])
    row_at = row.to(tl.int64) * width
    ptrs = out_ptr + (row_at[None, :] + column[:, None] if TURNED else row_at[:, None] + column[None, :])
    is_row, is_column = row < num_rows, column < width
    mask = is_row[None, :] & is_column[:, None] if TURNED else is_row[:, None] & is_column[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _add_product(acc: Value, x: Value, w_ptrs: Value, mask: Value, TURNED: constexpr, EVEN_K: constexpr) -> Value:
    w = tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=mask, other=0.0)
    left, right = (w, x) if TURNED else (x, w)
    return tl.dot(left, right, acc, input_precision="ieee")


@jit
def _sum_kernel(
    out_ptr: Value,  # [tokens, hidden]
    part_ptr: Value,  # [tokens * TOP_K, hidden]
    ids_ptr: Value,
    hidden: Value,
    TOP_K: constexpr,
    BLOCK: constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        row = token * TOP_K + i
        is_here = tl.load(ids_ptr + row) >= 0  # the rows of other ranks' experts were not written
        part = tl.load(part_ptr + row * hidden + column, mask=(column < hidden) & is_here, other=0.0)
        total += part.to(tl.float32)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=column < hidden)


def launch(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    num_tokens, hidden = x.shape
    num_experts, _, width = down.shape
    top_k = expert_ids.shape[1]
    num_rows = num_tokens * top_k
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out
    config = config_for("moe_experts", tokens=num_tokens, experts=num_experts, width=width, hidden=hidden)
    block_m = config["block_m"]
    ungrouped = num_rows <= UNGROUPED_UP_TO_ROWS
    if ungrouped:
        rows, block_experts, blocks = expert_ids, expert_ids, num_rows
    else:
        rows, block_experts = group_rows(expert_ids, num_experts, block_m)
        blocks = block_experts.numel()
    gated = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    parts = torch.empty(num_rows, hidden, dtype=x.dtype, device=x.device)
    is_wide = x.element_size() == 4  # fp32 has no tensor cores that keep its precision: small tiles
    block_k = 32 if is_wide else config["block_k"]
    turned = block_m <= _TURN_UP_TO_BLOCK
    for target, source, matrix, share, rows_per_x in (
        (gated, x, gate_up, "gate_block_n", top_k),
        (parts, gated, down, "down_block_n", 1),
    ):
        block_n = min(32, config[share]) if is_wide else config[share]
        out_width, k = target.shape[1], source.shape[1]
        _experts_kernel[(cdiv(out_width, block_n), blocks)](
            target, source, matrix, weights, rows, block_experts, num_rows, out_width, k, source.stride(0),
            ROWS_PER_X=rows_per_x, GATED=target is gated, UNGROUPED=ungrouped, TURNED=turned, EVEN_K=k % block_k == 0,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    sum_rows(out, parts, expert_ids)
    return out


def sum_rows(out: torch.Tensor, parts: torch.Tensor, expert_ids: torch.Tensor) -> None:
    """out [tokens, hidden] = the sum of each token's rows of parts [tokens * top_k, hidden], in their order."""
    num_tokens, hidden = out.shape
    block = min(1024, next_power_of_2(hidden))
    _sum_kernel[(num_tokens, cdiv(hidden, block))](
        out, parts, expert_ids, hidden, TOP_K=expert_ids.shape[1], BLOCK=block, num_warps=max(1, block // 256)
    )


def reference(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64, device=x.device)
    for expert in expert_ids.unique().tolist():
        if expert < 0:
            continue
        token, k = (expert_ids == expert).nonzero().unbind(1)
        gate, up = (x[token].double() @ gate_up[expert].double().T).chunk(2, dim=-1)
        hidden = (gate * torch.sigmoid(gate) * up) @ down[expert].double().T
        out.index_add_(0, token, hidden * weights[token, k, None].double())
    return out.to(x.dtype)


def cpu(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float32)
    for expert in expert_ids.unique().tolist():
        if expert < 0:
            continue
        token, k = (expert_ids == expert).nonzero().unbind(1)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        hidden = F.linear(F.silu(gate).mul_(up), down[expert])
        out.index_add_(0, token, hidden.float().mul_(weights[token, k, None]))
    return out.to(x.dtype)


def _cost(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> OpCost:
    here = expert_ids[expert_ids >= 0]
    return costs.moe_experts(
        x.shape[0], here.numel(), here.unique().numel(), x.shape[1], down.shape[2], x.element_size()
    )


def _case(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    width: int,
    dtype: torch.dtype,
    *,
    num_absent: int = 0,
    sass: tuple[str, ...] = (),
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = Draw(device, dtype)
        here = num_experts - num_absent
        x = draw.normal(num_tokens, hidden)
        gate_up = draw.normal(here, 2 * width, hidden).mul_(hidden**-0.5)
        down = draw.normal(here, hidden, width).mul_(width**-0.5)
        ids = draw_ids(draw, num_tokens, top_k, num_experts, num_absent)
        return x, gate_up, down, ids, draw.normal(num_tokens, top_k, dtype=torch.float32).softmax(dim=-1)

    name = f"{DTYPE_NAMES[dtype]} {num_tokens} tokens top{top_k} of {num_experts} {hidden}x{width}"
    return Case(name + " others away" * bool(num_absent), dtype, build, sass, target)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

SMALL = (
    _case(3, 2, 4, 48, 40, FP32),
    _case(2, 4, 8, 96, 64, BF16),
    _case(1, 2, 3, 130, 33, FP16),
    _case(20, 2, 4, 64, 48, BF16),  # grouped
    _case(19, 2, 5, 80, 30, FP32, num_absent=2),
    _case(40, 4, 6, 64, 32, FP16, num_absent=1),
    _case(600, 1, 2, 32, 24, BF16),  # large tiles
)
FULL = (
    _case(16, 8, 128, 2048, 768, FP32),
    _case(16, 8, 128, 2048, 768, FP16, sass=("HGMMA", "LDGSTS")),
    _case(1, 8, 128, 2048, 768, BF16, sass=("HMMA", "LDGSTS"), target=Target(0.60, "memory")),
    _case(16, 8, 128, 2048, 768, BF16, sass=("HGMMA", "LDGSTS"), target=Target(0.92, "memory")),
    _case(64, 8, 128, 2048, 768, BF16, sass=("HGMMA", "LDGSTS"), target=Target(0.92, "memory")),
    _case(256, 8, 128, 2048, 768, BF16, sass=("HGMMA", "LDGSTS")),
    _case(4096, 8, 128, 2048, 768, BF16, sass=("HGMMA", "LDGSTS"), target=Target(0.65, "gemm")),
    _case(128, 8, 256, 7168, 2048, BF16, num_absent=224, sass=("HGMMA", "LDGSTS"), target=Target(0.85, "memory")),
    _case(4096, 8, 256, 7168, 2048, BF16, num_absent=224, sass=("HGMMA", "LDGSTS")),
)

LIMIT = (
    "Memory up to 256 tokens (128 experts, top 8): each chosen expert's weights are read once; a lone token has three "
    "launches of a few microseconds each. Above, the tensor cores, with rows gathered by pointers: no bulk copies of x."
)

# A row is rounded twice on its way: after the gate, and before the sum.
TOLERANCE = {FP32: 1e-5, FP16: 3e-3, BF16: 2.4e-2}
moe_experts = Op("moe_experts", reference, launch, cpu, _cost, SMALL, FULL, tolerance=TOLERANCE, limit=LIMIT)
