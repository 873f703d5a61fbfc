"""Grouping of a batch's rows by the expert that each was routed to, in blocks for one expert each.

A row is one (token, k), numbered token * top_k + k. Every expert gets as many blocks of slots as its rows need, in the
order of the rows; an unused slot holds the number of rows, an unused block no expert. Without sorting: counts, running
sums, ranks. How many blocks there are follows shapes alone, so a launch can be captured in a CUDA graph. Knows nothing
of what experts compute.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op

NO_EXPERT = -1
ONE_PROGRAM_UP_TO_ROWS = 256  # groups them; above, counting and placing are spread over programs
_MAX_CHUNKS = 64
_STEP = 64  # rows that are compared with all experts at once


@jit
def _one_hot(ids_ptr: Value, row: Value, end: Value, EXPERTS: constexpr) -> Value:
    ids = tl.load(ids_ptr + row, mask=row < end, other=-1)
    return (ids[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@jit
def _count(ids_ptr: Value, begin: Value, end: Value, EXPERTS: constexpr, STEP: constexpr) -> Value:
    """How many of the rows begin .. end - 1 go to each expert."""
    counts = tl.zeros([EXPERTS], tl.int32)
    for start in range(begin, end, STEP):
        counts += tl.sum(_one_hot(ids_ptr, start + tl.arange(0, STEP), end, EXPERTS), 0)
    return counts


@jit
def _plan(
    rows_ptr: Value,
    block_experts_ptr: Value,
    counts: Value,  # [EXPERTS], of all rows
    num_rows: Value,
    max_blocks: Value,
    EXPERTS: constexpr,
    BLOCK: constexpr,
    STEP: constexpr,
) -> Value:
    """Give experts their blocks, say whose each block is, fill the slots that no row will take. Returns first slots."""
    num_blocks = (counts + BLOCK - 1) // BLOCK
    after = tl.cumsum(num_blocks, 0)
    first = after - num_blocks
    expert = tl.arange(0, EXPERTS)
    lane = tl.arange(0, BLOCK)
    for start in range(0, max_blocks, STEP):
        block = start + tl.arange(0, STEP)
        owns = (first[None, :] <= block[:, None]) & (block[:, None] < after[None, :])
        owner = tl.sum(tl.where(owns, expert[None, :] + 1, 0), 1) - 1
        tl.store(block_experts_ptr + block, owner, mask=block < max_blocks)
        rows_end = tl.sum(tl.where(owns, (first * BLOCK + counts)[None, :], 0), 1)
        slot = block[:, None] * BLOCK + lane[None, :]
        unused = (slot >= rows_end[:, None]) & (block < max_blocks)[:, None]
        tl.store(rows_ptr + slot, tl.zeros([STEP, BLOCK], tl.int32) + num_rows, mask=unused)
    return first * BLOCK


@jit
def _place(
    rows_ptr: Value,
    ids_ptr: Value,
    base: Value,  # [EXPERTS], the slot for the first of these rows
    begin: Value,
    end: Value,
    EXPERTS: constexpr,
    STEP: constexpr,
) -> None:
    for start in range(begin, end, STEP):
        row = start + tl.arange(0, STEP)
        chosen = _one_hot(ids_ptr, row, end, EXPERTS)
        slot = tl.sum(chosen * (tl.cumsum(chosen, 0) - 1 + base[None, :]), 1)
        tl.store(rows_ptr + slot, row, mask=tl.sum(chosen, 1) > 0)
        base += tl.sum(chosen, 0)


@jit
def _group_kernel(
    rows_ptr: Value,
    block_experts_ptr: Value,
    ids_ptr: Value,
    num_rows: Value,
    max_blocks: Value,
    EXPERTS: constexpr,
    BLOCK: constexpr,
    STEP: constexpr,
) -> None:
    counts = _count(ids_ptr, 0, num_rows, EXPERTS, STEP)
    base = _plan(rows_ptr, block_experts_ptr, counts, num_rows, max_blocks, EXPERTS, BLOCK, STEP)
    _place(rows_ptr, ids_ptr, base, 0, num_rows, EXPERTS, STEP)


@jit
def _count_kernel(
    counts_ptr: Value,  # [chunks, EXPERTS]
    ids_ptr: Value,
    num_rows: Value,
    chunk: Value,  # rows of one program
    EXPERTS: constexpr,
    STEP: constexpr,
) -> None:
    begin = tl.program_id(0) * chunk
    counts = _count(ids_ptr, begin, tl.minimum(begin + chunk, num_rows), EXPERTS, STEP)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), counts)


@jit
def _plan_kernel(
    rows_ptr: Value,
    block_experts_ptr: Value,
    counts_ptr: Value,  # [chunks, EXPERTS], replaced by each chunk's first slot for each expert
    num_rows: Value,
    max_blocks: Value,
    num_chunks: Value,
    CHUNKS: constexpr,
    EXPERTS: constexpr,
    BLOCK: constexpr,
    STEP: constexpr,
) -> None:
    chunk, expert = tl.arange(0, CHUNKS), tl.arange(0, EXPERTS)
    ptrs = counts_ptr + chunk[:, None] * EXPERTS + expert[None, :]
    mask = (chunk < num_chunks)[:, None] & (expert >= 0)[None, :]
    counts = tl.load(ptrs, mask=mask, other=0)
    base = _plan(
        rows_ptr, block_experts_ptr, tl.sum(counts, 0), num_rows, max_blocks, EXPERTS, BLOCK, STEP
    )  # fmt: skip
    tl.store(ptrs, tl.cumsum(counts, 0) - counts + base[None, :], mask=mask)


@jit
def _place_kernel(
    rows_ptr: Value,
    ids_ptr: Value,
    base_ptr: Value,  # [chunks, EXPERTS]
    num_rows: Value,
    chunk: Value,
    EXPERTS: constexpr,
    STEP: constexpr,
) -> None:
    begin = tl.program_id(0) * chunk
    base = tl.load(base_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS))
    _place(rows_ptr, ids_ptr, base, begin, tl.minimum(begin + chunk, num_rows), EXPERTS, STEP)


def max_blocks(num_rows: int, num_experts: int, block: int) -> int:
    """Whatever the ids are: no block is empty, and each expert has at most one that is not full."""
    return min(num_rows, num_rows // block + min(num_rows, num_experts))


def group_rows(expert_ids: torch.Tensor, num_experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = expert_ids.numel()
    blocks = max_blocks(num_rows, num_experts, block)
    rows = torch.empty(blocks * block, dtype=torch.int32, device=expert_ids.device)
    block_experts = torch.empty(blocks, dtype=torch.int32, device=expert_ids.device)
    experts = next_power_of_2(num_experts)
    if num_rows <= ONE_PROGRAM_UP_TO_ROWS:
        _group_kernel[(1,)](
            rows, block_experts, expert_ids, num_rows, blocks, EXPERTS=experts, BLOCK=block, STEP=_STEP, num_warps=8
        )
        return rows, block_experts
    chunk = cdiv(cdiv(num_rows, _MAX_CHUNKS), _STEP) * _STEP
    chunks = cdiv(num_rows, chunk)
    counts = torch.empty(chunks, experts, dtype=torch.int32, device=expert_ids.device)
    _count_kernel[(chunks,)](counts, expert_ids, num_rows, chunk, EXPERTS=experts, STEP=_STEP, num_warps=8)
    _plan_kernel[(1,)](
        rows, block_experts, counts, num_rows, blocks, chunks,
        CHUNKS=next_power_of_2(chunks), EXPERTS=experts, BLOCK=block, STEP=_STEP, num_warps=8,
    )  # fmt: skip
    _place_kernel[(chunks,)](rows, expert_ids, counts, num_rows, chunk, EXPERTS=experts, STEP=_STEP, num_warps=8)
    return rows, block_experts


def group(expert_ids: torch.Tensor, num_experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, and good enough for a CPU: each expert's rows in order, from a whole block on."""
    flat = expert_ids.view(-1)
    blocks = max_blocks(flat.numel(), num_experts, block)
    rows = torch.full((blocks * block,), flat.numel(), dtype=torch.int32, device=flat.device)
    block_experts = torch.full((blocks,), NO_EXPERT, dtype=torch.int32, device=flat.device)
    next_block = 0
    for expert in range(num_experts):
        mine = (flat == expert).nonzero().view(-1)
        rows[next_block * block : next_block * block + len(mine)] = mine.int()
        used = cdiv(len(mine), block)
        block_experts[next_block : next_block + used] = expert
        next_block += used
    return rows, block_experts


def _cost(expert_ids: torch.Tensor, num_experts: int, block: int) -> OpCost:
    return costs.group_by_expert(expert_ids.shape[0], expert_ids.shape[1], num_experts, block)


def draw_ids(draw: Draw, num_tokens: int, top_k: int, num_experts: int, num_absent: int = 0) -> torch.Tensor:
    """Distinct experts for each token, as a router gives them; the last `num_absent` experts are another rank's."""
    if draw.device == "meta":
        return torch.empty(num_tokens, top_k, dtype=torch.int32, device="meta")
    scores = draw.normal(num_tokens, num_experts, dtype=torch.float32)
    ids = scores.topk(top_k, dim=-1).indices.int()
    return torch.where(ids < num_experts - num_absent, ids, NO_EXPERT)


def _case(num_tokens: int, top_k: int, num_experts: int, block: int, num_absent: int = 0) -> Case:
    def build(device: str) -> tuple[torch.Tensor, int, int]:
        ids = draw_ids(Draw(device, torch.float32), num_tokens, top_k, num_experts, num_absent)
        return ids, num_experts - num_absent, block

    name = f"{num_tokens} tokens top{top_k} of {num_experts} block{block}{' others away' * bool(num_absent)}"
    return Case(name, torch.int32, build)


INT32 = torch.int32

SMALL = (
    _case(1, 4, 8, 16),
    _case(37, 3, 10, 16),  # experts that are no power of two, counts that are no whole blocks
    _case(64, 4, 4, 64, num_absent=1),
    _case(100, 4, 6, 16),  # several chunks
    _case(300, 2, 5, 128, num_absent=2),
)
FULL = (
    _case(16, 8, 128, 16),
    _case(64, 8, 128, 16),
    _case(4096, 8, 128, 128),
    _case(4096, 8, 256, 128),
)

LIMIT = (
    "Launches and latency: one program up to 256 rows; above, three launches, of which the second is one program. "
    "Ranks come from a running sum over a 64 x experts matrix of zeros and ones in registers, not from a sort."
)

group_by_expert = Op(
    "group_by_expert", group, group_rows, group, _cost, SMALL, FULL,
    tolerance={INT32: 0.0}, limit=LIMIT,
)  # fmt: skip
