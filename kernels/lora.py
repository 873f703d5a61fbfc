"""Adapters of low rank, for each row its own, added to a product's result: out += (x down^T) up^T, by the row's slot.

    out   [tokens, n], changed in place
    x     [tokens, k], rows contiguous
    down  [slots, pieces * rank, k]; up [slots, rank, n], times its scale; ranks are padded with zeros
    rows  which rows have a slot, sorted by it: LoraRows
    sizes columns of out that belong to each piece: matrices that are multiplied in one product have a down each

A tile is up to TILE_ROWS rows of one slot. The first launch multiplies by `down`, in shares of k that follow k alone;
the second adds the shares in their order, rounds once and multiplies by `up`. So a row's bits depend on its own numbers
and its own adapter, whatever rows are beside it. On the CPU the adapters of the step are one loop, or for a few rows of
several adapters one product with all of them, of which each row keeps its own. Knows nothing of models or of where
adapters come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.gemm.linear import fixed_order_linear
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op

TILE_ROWS = 16
_SHARE, _MOST_SHARES = 1024, 8  # of k
_AT_ONCE, _IN_A_LOOP = 1024, 2  # rows times slots that a CPU multiplies at once; adapters that it takes one by one
_BLOCK_K, _BLOCK_N, _BLOCK_RANK, _MOST_WIDTH = 64, 64, 64, 64


@dataclass(frozen=True, slots=True, eq=False)
class LoraRows:
    """The rows of a step that have an adapter."""

    tile_rows: Tensor  # int32 [tiles, TILE_ROWS], on the device; -1: no row
    tile_slots: Tensor  # int32 [tiles]
    segments: tuple[tuple[int, Tensor | slice], ...]  # of each slot its rows: int64 on the device, or a range of them
    is_other: Tensor | None = None  # bool [rows, slots, 1] on the host: the row is not of that slot, counted from the
    # first that is used. None: segments are taken one by one.
    fixed_order: bool = False  # on the CPU, too, a row's bits do not depend on how many rows its slot has

    @staticmethod
    def of(
        slots: npt.NDArray[np.int32], device: torch.device | str = "cpu", fixed_order: bool = False
    ) -> LoraRows | None:
        """slots: of each row of the batch; -1: none. None: no row has one."""
        used = np.flatnonzero(slots >= 0)
        if not len(used):
            return None
        order = used[np.argsort(slots[used], kind="stable")]
        found, starts, counts = np.unique(slots[order], return_index=True, return_counts=True)
        num_tiles = -(-counts // TILE_ROWS)
        tiles = np.full((int(num_tiles.sum()), TILE_ROWS), -1, np.int32)
        first_tile = np.cumsum(num_tiles) - num_tiles
        places = np.repeat(first_tile * TILE_ROWS - starts, counts) + np.arange(len(order))
        tiles.reshape(-1)[places] = order
        segments = tuple(
            (int(slot), _range_of(order[start : start + count], device))
            for slot, start, count in zip(found, starts, counts, strict=True)
        )
        tile_slots = np.repeat(found.astype(np.int32), num_tiles)
        on_device = [torch.from_numpy(each).to(device, non_blocking=True) for each in (tiles, tile_slots)]
        reach = np.arange(found[0], found[-1] + 1)
        is_other = None
        if len(found) > _IN_A_LOOP and len(slots) * len(reach) <= _AT_ONCE and not fixed_order:
            is_other = torch.from_numpy(slots[:, None, None] != reach[:, None])
        return LoraRows(on_device[0], on_device[1], segments, is_other, fixed_order)


def _range_of(rows: npt.NDArray[np.int64], device: torch.device | str) -> Tensor | slice:
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return slice(first, last + 1)
    return torch.from_numpy(rows).to(device)


@jit
def _down_kernel(
    sums_ptr: Value,  # [shares, tiles * BLOCK_M, width] fp32
    x_ptr: Value,
    down_ptr: Value,
    rows_ptr: Value,
    slots_ptr: Value,
    share_stride: Value,  # of the sums
    width: Value,  # pieces * rank
    k: Value,
    share: Value,  # of k for one program
    stride_x: Value,
    BLOCK_M: constexpr,
    BLOCK_W: constexpr,
    BLOCK_K: constexpr,
) -> None:
    tile = tl.program_id(0)
    lane, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    row = tl.load(rows_ptr + tile * BLOCK_M + lane).to(tl.int64)
    slot = tl.load(slots_ptr + tile).to(tl.int64)
    x_rows = x_ptr + tl.maximum(row, 0)[:, None] * stride_x
    w_rows = down_ptr + (slot * width + tl.minimum(column, width - 1))[None, :] * k
    first = tl.program_id(2) * share
    end = tl.minimum(first + share, k)
    acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    for start in range(first, end, BLOCK_K):
        at = start + depth
        x = tl.load(x_rows + at[None, :], mask=(row >= 0)[:, None] & (at < end)[None, :], other=0.0)
        w = tl.load(w_rows + at[:, None], mask=(at < end)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    sums = sums_ptr + tl.program_id(2).to(tl.int64) * share_stride
    at_out = (tile * BLOCK_M + lane)[:, None] * width + column[None, :]
    tl.store(sums + at_out, acc, mask=(column < width)[None, :])


@jit
def _up_kernel(
    out_ptr: Value,
    sums_ptr: Value,
    up_ptr: Value,
    rows_ptr: Value,
    slots_ptr: Value,
    share_stride: Value,
    n: Value,
    width: Value,
    rank: Value,
    first: Value,  # column of out that the piece begins with
    end: Value,
    first_sum: Value,  # column of the sums that the piece begins with
    stride_out: Value,
    SHARES: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_R: constexpr,
) -> None:
    tile = tl.program_id(0)
    lane, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    column = first + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(rows_ptr + tile * BLOCK_M + lane).to(tl.int64)
    slot = tl.load(slots_ptr + tile).to(tl.int64)
    up_columns = up_ptr + slot * rank * n + tl.minimum(column, end - 1)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rank, BLOCK_R):
        at = start + depth
        sums = sums_ptr + (tile * BLOCK_M + lane)[:, None] * width + first_sum + at[None, :]
        narrow = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for _ in tl.static_range(SHARES):
            narrow += tl.load(sums, mask=(at < rank)[None, :], other=0.0)
            sums += share_stride
        up = tl.load(up_columns + at[:, None] * n, mask=(at < rank)[:, None], other=0.0)
        acc = tl.dot(narrow.to(up_ptr.dtype.element_ty), up, acc, input_precision="ieee")
    ptrs = out_ptr + tl.maximum(row, 0)[:, None] * stride_out + column[None, :]
    mask = (row >= 0)[:, None] & (column < end)[None, :]
    acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch(out: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: LoraRows, sizes: Sequence[int]) -> Tensor:
    (_, width, k), (_, rank, n) = down.shape, up.shape
    num_tiles = rows.tile_slots.shape[0]
    shares = max(1, min(_MOST_SHARES, cdiv(k, _SHARE)))
    share = cdiv(cdiv(k, shares), _BLOCK_K) * _BLOCK_K
    shares = cdiv(k, share)
    block_w = min(_MOST_WIDTH, max(16, next_power_of_2(width)))
    sums = torch.empty(shares, num_tiles * TILE_ROWS, width, dtype=torch.float32, device=x.device)
    _down_kernel[(num_tiles, cdiv(width, block_w), shares)](
        sums, x, down, rows.tile_rows, rows.tile_slots, sums.stride(0), width, k, share, x.stride(0),
        BLOCK_M=TILE_ROWS, BLOCK_W=block_w, BLOCK_K=_BLOCK_K, num_warps=4, num_stages=3,
    )  # fmt: skip
    first = 0
    for piece, size in enumerate(sizes):
        _up_kernel[(num_tiles, cdiv(size, _BLOCK_N))](
            out, sums, up, rows.tile_rows, rows.tile_slots, sums.stride(0), n, width, rank, first, first + size,
            piece * rank, out.stride(0), SHARES=shares, BLOCK_M=TILE_ROWS, BLOCK_N=_BLOCK_N,
            BLOCK_R=min(_BLOCK_RANK, max(16, next_power_of_2(rank))), num_warps=4,
        )  # fmt: skip
        first += size
    return out


def reference(out: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: LoraRows, sizes: Sequence[int]) -> Tensor:
    rank = up.shape[1]
    for tile, slot in zip(rows.tile_rows.tolist(), rows.tile_slots.tolist(), strict=True):
        for row in (row for row in tile if row >= 0):
            narrow = down[slot].double() @ x[row].double()
            each = zip(narrow.split(rank), up[slot].double().split(list(sizes), dim=1), strict=True)
            out[row] = (out[row].double() + torch.cat([one @ part for one, part in each])).to(out.dtype)
    return out


def cpu(out: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: LoraRows, sizes: Sequence[int]) -> Tensor:
    if rows.is_other is not None:
        return _all_at_once(out, x, down, up, rows, sizes)
    rank, product = up.shape[1], _in_fixed_order if rows.fixed_order else torch.mm
    for slot, index in rows.segments:
        narrow, of_slot = product(x[index], down[slot].T), up[slot]
        target, first = out[index], 0
        for piece, size in enumerate(sizes):
            part = narrow[:, piece * rank : (piece + 1) * rank]
            target[:, first : first + size] += product(part, of_slot[:, first : first + size])
            first += size
        if not isinstance(index, slice):
            out[index] = target
    return out


def _in_fixed_order(x: Tensor, matrix: Tensor) -> Tensor:
    return fixed_order_linear(x, matrix.T, None)


def _all_at_once(
    out: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: LoraRows, sizes: Sequence[int]
) -> Tensor:  # fmt: skip
    """All rows by the matrices of all slots in reach; of each row all is set to 0 but what is its own."""
    assert rows.is_other is not None
    first_slot, rank, count = rows.segments[0][0], up.shape[1], rows.is_other.shape[1]
    narrow = F.linear(x, down[first_slot : first_slot + count].flatten(0, 1)).unflatten(1, (count, -1))
    narrow.masked_fill_(rows.is_other, 0.0)  # not a product with 0: another's numbers may be too large for the type
    ups, first = up[first_slot : first_slot + count].flatten(0, 1), 0
    for piece, size in enumerate(sizes):
        part = narrow[:, :, piece * rank : (piece + 1) * rank].flatten(1)
        out[:, first : first + size].addmm_(part, ups[:, first : first + size])
        first += size
    return out


def _cost(out: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: LoraRows, sizes: Sequence[int]) -> OpCost:
    num_rows = sum(index.stop - index.start if isinstance(index, slice) else len(index) for _, index in rows.segments)
    width, rank = down.shape[1], up.shape[1]
    return costs.add_lora(num_rows, len(rows.segments), (out.shape[1], x.shape[1]), width, rank, x.element_size())


def _case(
    slots: Sequence[int], sizes: Sequence[int], k: int, rank: int, dtype: torch.dtype, *, num_slots: int = 4,
    sass: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    def build(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, LoraRows, Sequence[int]]:
        draw, n = Draw(device, dtype), sum(sizes)
        down = draw.normal(num_slots, len(sizes) * rank, k).mul_(k**-0.5)
        up = draw.normal(num_slots, rank, n).mul_(rank**-0.5)
        rows = LoraRows.of(np.asarray(slots, np.int32), device)
        assert rows is not None
        return draw.normal(len(slots), n), draw.normal(len(slots), k), down, up, rows, sizes

    used = len({slot for slot in slots if slot >= 0})
    return Case(
        f"{DTYPE_NAMES[dtype]} {len(slots)}x{'+'.join(map(str, sizes))}x{k} rank{rank} of {used}", dtype, build, sass
    )


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

SMALL = (
    _case((2, -1, 0, 2), (40, 24, 24), 80, 8, FP32),
    _case((1, 1, 1), (70,), 130, 16, BF16),
    _case((3, 0, -1, 0, 3) * 9, (33, 31), 48, 5, FP16),
    _case((0, 1, 2, 3), (20,), 1100, 70, BF16),
    _case((3, 1, -1, 0, 3, 3), (40, 24, 24), 96, 8, FP32),
    _case((2, 0) * 40 + (1,) * 30, (24, 24), 48, 4, FP32),
)
_MIXED = tuple(i % 16 for i in range(64))
FULL = (
    _case((0,), (4096, 1024, 1024), 4096, 16, BF16, num_slots=16),
    _case(_MIXED, (4096, 1024, 1024), 4096, 16, BF16, num_slots=16, sass=("HMMA", "LDGSTS")),
    _case(_MIXED, (4096,), 14336, 16, FP16, num_slots=16, sass=("HMMA", "LDGSTS")),
    _case((0,) * 256 + (1,) * 256, (14336, 14336), 4096, 16, BF16, num_slots=16, sass=("HMMA", "LDGSTS")),
    _case(_MIXED, (4096,), 4096, 64, FP32, num_slots=16),
)

LIMIT = (
    "Latency for decodes: a launch for `down` and one for each piece of `up`, a few microseconds each; a program reads "
    "at most 1,024 of k. Prompts have tiles of 16 rows, so that a row's bits depend on nothing else, and read an "
    "adapter's matrices, which lie in the L2, once for each tile."
)

# The rows are rounded once between the products.
TOLERANCE = {FP32: 1e-5, FP16: 3e-3, BF16: 2.4e-2}
add_lora = Op("add_lora", reference, launch, cpu, _cost, SMALL, FULL, tolerance=TOLERANCE, limit=LIMIT)
