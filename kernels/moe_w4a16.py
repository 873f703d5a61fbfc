"""Mixture of experts, as kernels.moe, with weights of 4 bits.

    x               [tokens, hidden], of 16 bits
    gate_up         each expert's packed matrix [2 * width, hidden], stacked; its gate rows stand before its up rows
    down            each expert's packed matrix [hidden, width], stacked; the layout is that of kernels.gemm.codes4
    gate_up_scales  [experts, hidden / group, 2 * width], of x's dtype
    down_scales     [experts, width / group, hidden]
    expert_ids      [tokens, top_k] int32; a negative one is an expert of another rank and adds nothing here
    weights         [tokens, top_k] fp32
    ..._zeros       uint8, shaped as the scales: the code that means 0; None: 8
    table           16 numbers that the codes stand for; then there are no zeros

hidden and width are multiples of a block of the layout; who pads hidden pads x too, and gets `down`'s rows. Rows,
blocks and grids are those of kernels.moe. Every product is turned over (out^T = W x^T), and every weight is scaled in
16 bits: a gated tile has two sums already. Knows nothing of routers or ranks.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels import moe
from kernels.cases import DTYPE_NAMES, Draw
from kernels.gemm.codes4 import CODES_PER_WORD, E2M1, Table, assembly, decoded, dequantise, lanes_of
from kernels.grouping import draw_ids, group_rows
from kernels.jit import Value, cdiv, constexpr, jit, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for


@jit
def _experts_w4a16_kernel(
    out_ptr: Value,  # [rows, WIDTH]
    x_ptr: Value,  # [rows / ROWS_PER_X, k]
    packed_ptr: Value,  # [experts, blocks, WIDTH, LANES]; 2 WIDTH where GATED
    scales_ptr: Value,
    zeros_ptr: Value,  # read only where HAS_ZEROS
    weights_ptr: Value,  # [rows] fp32; not read where GATED
    rows_ptr: Value,  # a row per slot; not read where UNGROUPED
    experts_ptr: Value,  # an expert per block of slots
    num_rows: Value,
    width: Value,
    num_blocks: Value,  # of k
    stride_x: Value,
    ROWS_PER_X: constexpr,
    GATED: constexpr,  # silu(gate) * up; otherwise times the row's weight
    UNGROUPED: constexpr,  # block i is row i alone
    LANES: constexpr,
    GROUP: constexpr,
    HAS_ZEROS: constexpr,
    TABLE: constexpr,
    ASM: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    slots = tl.program_id(1)
    expert = tl.load(experts_ptr + slots).to(tl.int64)
    if expert < 0:
        return
    slot = tl.arange(0, BLOCK_M)
    row = tl.where(slot == 0, slots, num_rows) if UNGROUPED else tl.load(rows_ptr + slots * BLOCK_M + slot)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANES)
    # Unused slots and columns behind the end read others' again: no mask in the loop, and they are not stored.
    x_rows = x_ptr + (tl.minimum(row, num_rows - 1) // ROWS_PER_X).to(tl.int64)[None, :] * stride_x
    in_reach = tl.minimum(column, width - 1)
    words = in_reach[:, None] * LANES + lane[None, :]
    n = 2 * width if GATED else width
    block_ptr = packed_ptr + expert * num_blocks * n * LANES
    first_group = expert * num_blocks * (4 * LANES // GROUP) * n
    first = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(num_blocks):
        word = tl.load(block_ptr + words)
        second_word = tl.load(block_ptr + width * LANES + words) if GATED else word
        block_ptr += n * LANES
        for group in tl.static_range(4 * LANES // GROUP):
            at = first_group + (block * (4 * LANES // GROUP) + group) * n + in_reach
            scale, zero = _scale_and_zero(scales_ptr + at, zeros_ptr + at, HAS_ZEROS, LANES)
            if GATED:
                at += width
                second_scale, second_zero = _scale_and_zero(scales_ptr + at, zeros_ptr + at, HAS_ZEROS, LANES)
            for step in tl.static_range(GROUP // LANES):
                x = tl.load(x_rows + (block * 4 * LANES + group * GROUP + step * LANES + lane)[:, None])
                w = decoded(word, zero, group * (GROUP // LANES) + step, TABLE, ASM) * scale
                first = tl.dot(w, x, first)
                if GATED:
                    w = decoded(second_word, second_zero, group * (GROUP // LANES) + step, TABLE, ASM) * second_scale
                    second = tl.dot(w, x, second)
    if GATED:
        out = first / (1.0 + tl.exp(-first)) * second
    else:
        out = first * tl.load(weights_ptr + row, mask=row < num_rows, other=0.0)[None, :]
    ptrs = out_ptr + row.to(tl.int64)[None, :] * width + column[:, None]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=(row < num_rows)[None, :] & (column < width)[:, None])


@jit
def _scale_and_zero(scale_ptrs: Value, zero_ptrs: Value, HAS_ZEROS: constexpr, LANES: constexpr) -> Value:
    """Of a group, for each word of a tile."""
    scale = tl.load(scale_ptrs)
    offset: tl.constexpr = 128 if scale.dtype == tl.bfloat16 else 1024
    symmetric: tl.constexpr = offset + 8
    if HAS_ZEROS:
        zero = (tl.load(zero_ptrs).to(tl.float32) + offset).to(scale.dtype)
    else:
        zero = tl.full(scale.shape, symmetric, tl.float32).to(scale.dtype)
    shape: tl.constexpr = [scale.shape[0], LANES]
    return tl.broadcast_to(scale[:, None], shape), tl.broadcast_to(zero[:, None], shape)


def launch(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_scales: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up_zeros: torch.Tensor | None = None,
    down_zeros: torch.Tensor | None = None,
    table: Table | None = None,
) -> torch.Tensor:
    num_experts, _, hidden, _ = down.shape
    num_tokens, top_k = expert_ids.shape
    width = gate_up.shape[2] // 2
    num_rows = num_tokens * top_k
    out = torch.empty(num_tokens, hidden, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    config = config_for("moe_experts_w4a16", tokens=num_tokens, experts=num_experts, width=width, hidden=hidden)
    block_m = config["block_m"]
    ungrouped = num_rows <= moe.UNGROUPED_UP_TO_ROWS
    if ungrouped:
        rows, block_experts, blocks = expert_ids, expert_ids, num_rows
    else:
        rows, block_experts = group_rows(expert_ids, num_experts, block_m)
        blocks = block_experts.numel()
    gated = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    parts = torch.empty(num_rows, hidden, dtype=x.dtype, device=x.device)
    for target, source, packed, scales, zeros, share, rows_per_x in (
        (gated, x, gate_up, gate_up_scales, gate_up_zeros, "gate_block_n", top_k),
        (parts, gated, down, down_scales, down_zeros, "down_block_n", 1),
    ):
        _, num_blocks, _, lanes = packed.shape
        _experts_w4a16_kernel[(cdiv(target.shape[1], config[share]), blocks)](
            target, source, packed, scales, packed if zeros is None else zeros, weights, rows, block_experts,
            num_rows, target.shape[1], num_blocks, source.stride(0),
            ROWS_PER_X=rows_per_x, GATED=target is gated, UNGROUPED=ungrouped,
            LANES=lanes, GROUP=num_blocks * CODES_PER_WORD * lanes // scales.shape[1],
            HAS_ZEROS=zeros is not None, TABLE=table, ASM=() if x.device.type == "cpu" else assembly(x.dtype, table),
            BLOCK_M=block_m, BLOCK_N=config[share], num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    moe.sum_rows(out, parts, expert_ids)
    return out


def _dense(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, dtype: torch.dtype, table: Table | None
) -> torch.Tensor:
    """All experts' matrices."""
    each = zip(packed, scales, [None] * len(packed) if zeros is None else zeros, strict=True)
    return torch.stack([dequantise(*expert, dtype, table) for expert in each])


def reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_scales: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up_zeros: torch.Tensor | None = None,
    down_zeros: torch.Tensor | None = None,
    table: Table | None = None,
) -> torch.Tensor:
    wide_gate_up = _dense(gate_up, gate_up_scales, gate_up_zeros, torch.float64, table)
    wide_down = _dense(down, down_scales, down_zeros, torch.float64, table)
    return moe.reference(x, wide_gate_up, wide_down, expert_ids, weights)


def cpu(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_scales: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up_zeros: torch.Tensor | None = None,
    down_zeros: torch.Tensor | None = None,
    table: Table | None = None,
) -> torch.Tensor:
    """Expert by expert: what is dequantized is one expert's."""
    out = torch.zeros(x.shape[0], down.shape[2], dtype=torch.float32)
    for expert in expert_ids.unique().tolist():
        if expert < 0:
            continue
        here = slice(expert, expert + 1)
        zeros = [None if every is None else every[here] for every in (gate_up_zeros, down_zeros)]
        wide_gate_up = _dense(gate_up[here], gate_up_scales[here], zeros[0], torch.float32, table)
        wide_down = _dense(down[here], down_scales[here], zeros[1], torch.float32, table)
        ids = torch.where(expert_ids == expert, 0, -1)
        out += moe.cpu(x.float(), wide_gate_up, wide_down, ids, weights)
    return out.to(x.dtype)


def _cost(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_scales: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up_zeros: torch.Tensor | None = None,
    down_zeros: torch.Tensor | None = None,
    table: Table | None = None,
) -> OpCost:
    here = expert_ids[expert_ids >= 0]
    num_tokens, hidden = x.shape
    return costs.moe_experts_w4a16(
        num_tokens, here.numel(), here.unique().numel(), hidden, gate_up.shape[2] // 2,
        hidden // gate_up_scales.shape[1], gate_up_zeros is not None, x.element_size(),
    )  # fmt: skip


def _case(
    tokens: tuple[int, int],  # and how many experts each is routed to
    experts: tuple[int, int],  # and how many of them are on other ranks
    hidden: int,
    width: int,
    dtype: torch.dtype,
    *,
    group: int = 128,
    has_zeros: bool = False,
    table: Table | None = None,
    sass: tuple[str, ...] = (),
    target: Target | None = None,
) -> Case:
    here, lanes = experts[0] - experts[1], lanes_of(group)

    def build(device: str) -> tuple[torch.Tensor | Table | None, ...]:
        draw = Draw(device, dtype)

        def matrices(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            packed = draw.bits(here, k // (CODES_PER_WORD * lanes), n, lanes, dtype=torch.int16)
            scales = draw.normal(here, k // group, n).mul_(0.2 * k**-0.5)
            return packed, scales, draw.below(17, here, k // group, n, dtype=torch.uint8) if has_zeros else None

        x = draw.normal(tokens[0], hidden)
        gate_up, gate_up_scales, gate_up_zeros = matrices(2 * width, hidden)
        down, down_scales, down_zeros = matrices(hidden, width)
        ids = draw_ids(draw, *tokens, *experts)
        weights = draw.normal(*tokens, dtype=torch.float32).softmax(dim=-1)
        return x, gate_up, down, gate_up_scales, down_scales, ids, weights, gate_up_zeros, down_zeros, table

    name = f"{DTYPE_NAMES[dtype]} {tokens[0]} tokens top{tokens[1]} of {experts[0]} {hidden}x{width} group{group}"
    options = " zeros" * has_zeros + " e2m1" * (table == E2M1) + " others away" * bool(experts[1])
    return Case(name + options, dtype, build, sass, target)


FP16, BF16 = torch.float16, torch.bfloat16
_SASS = ("HGMMA", "LDGSTS")
_QWEN = ((128, 0), 2048, 768)
_DEEPSEEK = ((256, 224), 7168, 2048)

SMALL = (
    _case((2, 4), (8, 0), 128, 128, BF16),
    _case((3, 2), (4, 0), 256, 128, FP16, group=64, has_zeros=True),
    _case((20, 2), (4, 0), 128, 128, BF16, group=32, table=E2M1),  # grouped
    _case((19, 2), (5, 2), 128, 64, FP16, group=16),
    _case((40, 4), (6, 1), 128, 128, BF16, has_zeros=True),
    _case((300, 1), (2, 0), 128, 128, FP16, group=32, table=E2M1),  # large tiles
)
FULL = (
    _case((1, 8), *_QWEN, BF16, sass=("HMMA", "LDGSTS"), target=Target(0.50, "memory")),
    _case((16, 8), *_QWEN, BF16, sass=_SASS, target=Target(0.75, "memory")),
    _case((16, 8), *_QWEN, FP16, group=64, has_zeros=True, sass=_SASS),
    _case((64, 8), *_QWEN, BF16, sass=_SASS, target=Target(0.75, "memory")),
    _case((256, 8), *_QWEN, BF16, has_zeros=True, sass=_SASS),
    _case((4096, 8), *_QWEN, BF16, sass=_SASS, target=Target(0.50, "gemm")),
    _case((16, 8), *_QWEN, BF16, group=32, table=E2M1, sass=_SASS, target=Target(0.65, "memory")),
    _case((4096, 8), *_QWEN, BF16, group=32, table=E2M1, sass=_SASS),
    _case((128, 8), *_DEEPSEEK, BF16, group=16, table=E2M1, sass=_SASS),
)

LIMIT = (
    "Memory up to 256 tokens (128 experts, top 8), with instructions close behind as in w4a16_gemm: 401 for 8 KB of a "
    "gated tile of 64 columns, 578 of e2m1. Scales come by plain loads; five blocks per SM hide them. Above, tensor "
    "cores and the decoding: a tile of 128x128 decodes its weights for 128 rows only."
)

# A row is rounded twice on its way, and each scaled weight once.
TOLERANCE = {FP16: 4e-3, BF16: 3e-2}
moe_experts_w4a16 = Op(
    "moe_experts_w4a16", reference, launch, cpu, _cost, SMALL, FULL, tolerance=TOLERANCE, limit=LIMIT
)
