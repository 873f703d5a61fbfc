"""Mixture of experts, as kernels.experts.moe, with weights of 4 or 8 bits and a scale per group.

    x           [tokens, hidden], of 16 bits
    gate_up     the experts' matrices [2 * width, hidden]; gate rows stand before up rows
    down        the experts' matrices [hidden, width], which may have other bits and groups
    expert_ids  [tokens, top_k] int32; a negative one is an expert of another rank and adds nothing here
    weights     [tokens, top_k] fp32

hidden and width are multiples of a block of the layout; who pads hidden pads x too, and gets `down`'s rows. Rows,
blocks and grids are those of kernels.experts.moe. Every product is turned over (out^T = W x^T), and every weight is
scaled in 16 bits: a gated tile has two sums already. Knows nothing of routers or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.experts import moe
from kernels.experts.grouping import draw_ids, group_rows
from kernels.gemm import codes4, codes8
from kernels.gemm.codes4 import E2M1, Table, assembly, decoded
from kernels.gemm.codes8 import decoded8
from kernels.jit import Value, cdiv, constexpr, jit, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCodes:
    """The layouts are those of kernels.gemm.w4a16 and w8a16, of each expert one."""

    codes: torch.Tensor  # [experts, blocks, n, lanes] int16
    scales: torch.Tensor  # [experts, groups, n], of the activations' dtype
    zeros: torch.Tensor | None = None  # uint8, shaped as scales
    offsets: torch.Tensor | None = None  # shaped as scales
    table: Table | None = None  # 16 numbers that codes of 4 bits stand for
    bits: int = 4

    @property
    def codes_per_word(self) -> int:
        """4 or 2."""
        return 16 // self.bits

    @property
    def group(self) -> int:
        """Inputs per scale."""
        _, num_blocks, _, lanes = self.codes.shape
        return num_blocks * self.codes_per_word * lanes // self.scales.shape[1]

    def of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """An expert's weights [n, k]."""
        zeros, offsets = (None if every is None else every[expert] for every in (self.zeros, self.offsets))
        if self.bits == 8:
            return codes8.dequantise(self.codes[expert], self.scales[expert], zeros, offsets, dtype)
        return codes4.dequantise(self.codes[expert], self.scales[expert], zeros, dtype, self.table, offsets)


@jit
def _experts_weight_only_kernel(
    out_ptr: Value,  # [rows, WIDTH]
    x_ptr: Value,  # [rows / ROWS_PER_X, k]
    packed_ptr: Value,  # [experts, blocks, WIDTH, LANES]; 2 WIDTH where GATED
    scales_ptr: Value,
    zeros_ptr: Value,  # read only where HAS_ZEROS
    offsets_ptr: Value,  # read only where HAS_OFFSETS
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
    CODES: constexpr,  # in a word: 4 of 4 bits, 2 of 8
    LANES: constexpr,
    GROUP: constexpr,
    HAS_ZEROS: constexpr,
    HAS_OFFSETS: constexpr,
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
    first_group = expert * num_blocks * (CODES * LANES // GROUP) * n
    first = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(num_blocks):
        word = tl.load(block_ptr + words)
        second_word = tl.load(block_ptr + width * LANES + words) if GATED else word
        block_ptr += n * LANES
        for group in tl.static_range(CODES * LANES // GROUP):
            at = first_group + (block * (CODES * LANES // GROUP) + group) * n + in_reach
            scale, zero = _scale_and_zero(scales_ptr + at, zeros_ptr + at, CODES, HAS_ZEROS, LANES)
            offset = tl.load(offsets_ptr + at)[:, None] if HAS_OFFSETS else scale
            if GATED:
                at += width
                second_scale, second_zero = _scale_and_zero(scales_ptr + at, zeros_ptr + at, CODES, HAS_ZEROS, LANES)
                second_offset = tl.load(offsets_ptr + at)[:, None] if HAS_OFFSETS else second_scale
            for step in tl.static_range(GROUP // LANES):
                x = tl.load(x_rows + (block * CODES * LANES + group * GROUP + step * LANES + lane)[:, None])
                w = _decoded(word, zero, group * (GROUP // LANES) + step, CODES, TABLE, ASM) * scale
                first = tl.dot(w + offset if HAS_OFFSETS else w, x, first)
                if GATED:
                    w = _decoded(second_word, second_zero, group * (GROUP // LANES) + step, CODES, TABLE, ASM)
                    w *= second_scale
                    second = tl.dot(w + second_offset if HAS_OFFSETS else w, x, second)
    if GATED:
        out = first / (1.0 + tl.exp(-first)) * second
    else:
        out = first * tl.load(weights_ptr + row, mask=row < num_rows, other=0.0)[None, :]
    ptrs = out_ptr + row.to(tl.int64)[None, :] * width + column[:, None]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=(row < num_rows)[None, :] & (column < width)[:, None])


@jit
def _decoded(word: Value, zero: Value, I: constexpr, CODES: constexpr, TABLE: constexpr, ASM: constexpr) -> Value:  # noqa: E741
    return decoded(word, zero, I, TABLE, ASM) if CODES == 4 else decoded8(word, zero, I, ASM)


@jit
def _scale_and_zero(
    scale_ptrs: Value, zero_ptrs: Value, CODES: constexpr, HAS_ZEROS: constexpr, LANES: constexpr
) -> Value:
    """Of a group, for each word of a tile."""
    scale = tl.load(scale_ptrs)
    # What a decoder wants added to the zero point.
    added: tl.constexpr = 1024 if scale.dtype != tl.bfloat16 else (128 if CODES == 4 else 0)
    symmetric: tl.constexpr = added + (8 if CODES == 4 else 128)
    if HAS_ZEROS:
        zero = (tl.load(zero_ptrs).to(tl.float32) + added).to(scale.dtype)
    else:
        zero = tl.full(scale.shape, symmetric, tl.float32).to(scale.dtype)
    shape: tl.constexpr = [scale.shape[0], LANES]
    return tl.broadcast_to(scale[:, None], shape), tl.broadcast_to(zero[:, None], shape)


def launch(
    x: torch.Tensor, gate_up: ExpertCodes, down: ExpertCodes, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    num_experts, _, hidden, _ = down.codes.shape
    num_tokens, top_k = expert_ids.shape
    width = gate_up.codes.shape[2] // 2
    num_rows = num_tokens * top_k
    out = torch.empty(num_tokens, hidden, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    config = config_for("moe_experts_weight_only", tokens=num_tokens, experts=num_experts, width=width, hidden=hidden)
    block_m = config["block_m"]
    ungrouped = num_rows <= moe.UNGROUPED_UP_TO_ROWS
    if ungrouped:
        rows, block_experts, blocks = expert_ids, expert_ids, num_rows
    else:
        rows, block_experts = group_rows(expert_ids, num_experts, block_m)
        blocks = block_experts.numel()
    gated = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    parts = torch.empty(num_rows, hidden, dtype=x.dtype, device=x.device)
    for target, source, matrix, block_n, rows_per_x in (
        (gated, x, gate_up, config["gate_block_n"], top_k),
        (parts, gated, down, config["down_block_n"], 1),
    ):
        _, num_blocks, _, lanes = matrix.codes.shape
        _experts_weight_only_kernel[(cdiv(target.shape[1], block_n), blocks)](
            target, source, matrix.codes, matrix.scales,
            matrix.codes if matrix.zeros is None else matrix.zeros,
            matrix.scales if matrix.offsets is None else matrix.offsets,
            weights, rows, block_experts, num_rows, target.shape[1], num_blocks, source.stride(0),
            ROWS_PER_X=rows_per_x, GATED=target is gated, UNGROUPED=ungrouped,
            CODES=matrix.codes_per_word, LANES=lanes, GROUP=matrix.group,
            HAS_ZEROS=matrix.zeros is not None, HAS_OFFSETS=matrix.offsets is not None, TABLE=matrix.table,
            ASM=_assembly(x, matrix),
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    moe.sum_rows(out, parts, expert_ids)
    return out


def _assembly(x: torch.Tensor, matrix: ExpertCodes) -> tuple[str, ...]:
    if x.device.type == "cpu":
        return ()
    return codes8.ASSEMBLY[x.dtype] if matrix.bits == 8 else assembly(x.dtype, matrix.table)


def reference(
    x: torch.Tensor, gate_up: ExpertCodes, down: ExpertCodes, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    each = range(len(down.codes))
    wide = [torch.stack([matrix.of(expert, torch.float64) for expert in each]) for matrix in (gate_up, down)]
    return moe.reference(x, wide[0], wide[1], expert_ids, weights)


def cpu(
    x: torch.Tensor, gate_up: ExpertCodes, down: ExpertCodes, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Expert by expert: what is dequantized is one expert's."""
    out = torch.zeros(x.shape[0], down.codes.shape[2], dtype=torch.float32)
    for expert in expert_ids.unique().tolist():
        if expert < 0:
            continue
        wide = [matrix.of(expert, torch.float32).unsqueeze(0) for matrix in (gate_up, down)]
        out += moe.cpu(x.float(), wide[0], wide[1], torch.where(expert_ids == expert, 0, -1), weights)
    return out.to(x.dtype)


def _cost(
    x: torch.Tensor, gate_up: ExpertCodes, down: ExpertCodes, expert_ids: torch.Tensor, weights: torch.Tensor
) -> OpCost:
    here = expert_ids[expert_ids >= 0]
    num_tokens, hidden = x.shape
    stored = sum(
        tensor.nbytes
        for matrix in (gate_up, down)
        for tensor in (matrix.codes, matrix.scales, matrix.zeros, matrix.offsets)
        if tensor is not None
    )
    num_active = here.unique().numel()
    return costs.moe_experts_weight_only(
        num_tokens, here.numel(), hidden, gate_up.codes.shape[2] // 2, stored * num_active // len(down.codes),
        x.element_size(),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Kind:
    """Of a matrix's weights."""

    bits: int = 4
    group: int = 128
    has_zeros: bool = False
    has_offsets: bool = False
    table: Table | None = None

    def __str__(self) -> str:
        options = " zeros" * self.has_zeros + " offsets" * self.has_offsets + " e2m1" * (self.table == E2M1)
        return f"W{self.bits} group{self.group}{options}"

    def draw(self, draw: Draw, num_experts: int, n: int, k: int) -> ExpertCodes:
        layout = codes4 if self.bits == 4 else codes8
        lanes, groups = layout.lanes_of(self.group), (num_experts, k // self.group, n)
        return ExpertCodes(
            draw.bits(num_experts, k // (layout.CODES_PER_WORD * lanes), n, lanes, dtype=torch.int16),
            draw.normal(*groups).mul_((0.2 if self.bits == 4 else 0.012) * k**-0.5),
            draw.below(17 if self.bits == 4 else 256, *groups, dtype=torch.uint8) if self.has_zeros else None,
            draw.normal(*groups).mul_(0.5 * k**-0.5) if self.has_offsets else None,
            self.table,
            self.bits,
        )


def _case(
    tokens: tuple[int, int],  # and how many experts each is routed to
    experts: tuple[int, int],  # and how many of them are on other ranks
    hidden: int,
    width: int,
    dtype: torch.dtype,
    kind: _Kind,
    down: _Kind | None = None,
    *,
    sass: tuple[str, ...] = (),
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor | ExpertCodes, ...]:
        draw = Draw(device, dtype)
        here = experts[0] - experts[1]
        x = draw.normal(tokens[0], hidden)
        matrices = kind.draw(draw, here, 2 * width, hidden), (down or kind).draw(draw, here, hidden, width)
        weights = draw.normal(*tokens, dtype=torch.float32).softmax(dim=-1)
        return x, *matrices, draw_ids(draw, *tokens, *experts), weights

    name = f"{DTYPE_NAMES[dtype]} {tokens[0]} tokens top{tokens[1]} of {experts[0]} {hidden}x{width} {kind}"
    options = f" and {down}" * (down is not None) + " others away" * bool(experts[1])
    return Case(name + options, dtype, build, sass, target)


FP16, BF16 = torch.float16, torch.bfloat16
_SASS = ("HGMMA", "LDGSTS")
_QWEN = ((128, 0), 2048, 768)
_DEEPSEEK = ((256, 224), 7168, 2048)
_PLAIN, _ZEROS, _FINE, _MXFP4 = (
    _Kind(),
    _Kind(has_zeros=True),
    _Kind(group=64, has_zeros=True),
    _Kind(group=32, table=E2M1),
)
_Q4_K, _Q6_K = _Kind(group=32, has_offsets=True), _Kind(8, 16)

SMALL = (
    _case((2, 4), (8, 0), 128, 128, BF16, _PLAIN),
    _case((3, 2), (4, 0), 256, 128, FP16, _FINE),
    _case((20, 2), (4, 0), 128, 128, BF16, _MXFP4),  # grouped
    _case((19, 2), (5, 2), 128, 64, FP16, _Kind(group=16)),
    _case((40, 4), (6, 1), 128, 128, BF16, _ZEROS),
    _case((300, 1), (2, 0), 128, 128, FP16, _MXFP4),  # large tiles
    _case((5, 2), (4, 0), 128, 128, BF16, _Q4_K, _Q6_K),
    _case((20, 2), (4, 0), 128, 128, FP16, _Kind(8, has_zeros=True)),
)
FULL = (
    _case((1, 8), *_QWEN, BF16, _PLAIN, sass=("HMMA", "LDGSTS"), target=Target(0.50, "memory")),
    _case((16, 8), *_QWEN, BF16, _PLAIN, sass=_SASS, target=Target(0.75, "memory")),
    _case((16, 8), *_QWEN, FP16, _FINE, sass=_SASS),
    _case((64, 8), *_QWEN, BF16, _PLAIN, sass=_SASS, target=Target(0.75, "memory")),
    _case((256, 8), *_QWEN, BF16, _ZEROS, sass=_SASS),
    _case((4096, 8), *_QWEN, BF16, _PLAIN, sass=_SASS, target=Target(0.50, "gemm")),
    _case((16, 8), *_QWEN, BF16, _MXFP4, sass=_SASS, target=Target(0.65, "memory")),
    _case((4096, 8), *_QWEN, BF16, _MXFP4, sass=_SASS),
    _case((128, 8), *_DEEPSEEK, BF16, _Kind(group=16, table=E2M1), sass=_SASS),
    _case((16, 8), *_QWEN, BF16, _Q4_K, _Q6_K, sass=_SASS),
)

LIMIT = (
    "Memory up to 256 tokens (128 experts, top 8), with instructions close behind as in w4a16_gemm: 400 for 8 KB of a "
    "gated tile of 64 columns, 578 of e2m1. Scales come by plain loads; five blocks per SM hide them. Above, tensor "
    "cores and the decoding: a tile of 128x128 decodes its weights for 128 rows only."
)

# A row is rounded twice on its way, and each scaled weight once.
TOLERANCE = {FP16: 4e-3, BF16: 3e-2}
moe_experts_weight_only = Op(
    "moe_experts_weight_only", reference, launch, cpu, _cost, SMALL, FULL, tolerance=TOLERANCE, limit=LIMIT
)
