"""The largest logit of each row of one shard of the vocabulary, and its id; with noise on top, a sample's choice.

A row is cut into as many splits as fill the device; on a tie the smallest id wins, so ranks reduce one (value, id) pair
however the vocabulary is cut. `kernels.sampling` makes its choice here, among the logits that its filters leave. Knows
nothing of requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, num_sms, tl
from kernels.op import Case, Op, Target
from kernels.philox import fast_gumbel, gumbel_bound, words_of_tile

_BLOCK = 2048
_PROGRAMS_PER_SM = 4
# Tiles of a row under way at a time, by copies to shared memory: a pass would otherwise wait for each. Two blocks of
# the filter share an SM then; with five stages its registers leave space for one.
STAGES = 4
_MAX_SPLITS = 64

Choice = tuple[Tensor, Tensor]
"""Value (fp32) and id (int64) of each row."""


@jit
def inverse_of(temperature: Value) -> Value:
    """Of next to no temperature a number that still leaves every product finite."""
    return tl.minimum(1.0 / temperature, 1e30)


@jit
def _noisy_argmax(
    row_ptr: Value,
    threshold: Value,
    temperature: Value,
    seed: Value,
    position: Value,
    num_ids: Value,
    first_id: Value,
    first: Value,
    end: Value,
    SHIFT: constexpr,
    BLOCK: constexpr,
    STAGES: constexpr,
) -> tuple[Value, Value]:
    """The best score among the indices first - SHIFT .. end - SHIFT, and its index.

    A tile's logarithms are taken only if one of its scores may be the best so far, by a bound on the noise that needs
    none. Tiles that pass become rare soon: the j-th does with a probability of about 1 / j.
    """
    inverse = inverse_of(tl.where(temperature > 0, temperature, 1.0))
    best, chosen = -3.0e38, tl.maximum(first - SHIFT, 0)
    lane = tl.arange(0, BLOCK)
    for start in tl.range(first, end, BLOCK, num_stages=STAGES):
        index = start - SHIFT + lane
        mask = (index >= 0) & (index < num_ids)
        x = tl.load(row_ptr + index, mask=mask, other=float("-inf")).to(tl.float32)
        score = tl.where(x >= threshold, x * inverse, float("-inf"))
        if temperature > 0:
            words = words_of_tile(seed, position, (first_id - SHIFT + start) // 4, BLOCK)
            if tl.max(score + gumbel_bound(words), 0) >= best - 1e-3 - tl.abs(best) * 1e-6:
                score += fast_gumbel(words)
            else:
                score = tl.full([BLOCK], float("-inf"), tl.float32)
        top = tl.max(score, 0)
        if top > best:
            best = top
            chosen = tl.min(tl.where(score == top, index, 0x7FFFFFFF), 0)
    return best, chosen


@jit
def _choose_kernel(
    value_ptr: Value,  # [rows, SPLITS] fp32
    id_ptr: Value,  # [rows, SPLITS] int64
    logits_ptr: Value,  # [rows, num_ids]
    threshold_ptr: Value,
    temperature_ptr: Value,
    seed_ptr: Value,
    position_ptr: Value,
    stride: Value,
    num_ids: Value,
    first_id: Value,
    ids_per_split: Value,  # a multiple of BLOCK
    SHIFT: constexpr,  # of first_id in its block of four
    SAMPLED: constexpr,
    SPLITS: constexpr,
    BLOCK: constexpr,
    STAGES: constexpr,
) -> None:
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    threshold, temperature = float("-inf"), 0.0
    if SAMPLED:
        threshold, temperature = tl.load(threshold_ptr + row), tl.load(temperature_ptr + row).to(tl.float32)
    if threshold < float("inf"):
        lane = tl.arange(0, BLOCK)
        first, end = split * ids_per_split, tl.minimum((split + 1) * ids_per_split, num_ids + SHIFT)
        row_ptr = logits_ptr + row * stride
        if SAMPLED:
            seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
            top, chosen = _noisy_argmax(
                row_ptr, threshold, temperature, seed, position, num_ids, first_id, first, end, SHIFT, BLOCK, STAGES
            )
        else:
            best = tl.full([BLOCK], float("-inf"), tl.float32)
            best_index = first - SHIFT + lane
            for start in tl.range(first, end, BLOCK, num_stages=STAGES):
                index = start - SHIFT + lane
                mask = (index >= 0) & (index < num_ids)
                x = tl.load(row_ptr + index, mask=mask, other=float("-inf")).to(tl.float32)
                is_better = x > best
                best = tl.where(is_better, x, best)
                best_index = tl.where(is_better, index, best_index)
            top = tl.max(best, 0)
            chosen = tl.min(tl.where((best == top) & (best_index >= 0), best_index, 0x7FFFFFFF), 0)
        tl.store(value_ptr + row * SPLITS + split, top)
        tl.store(id_ptr + row * SPLITS + split, chosen.to(tl.int64) + first_id)


@jit
def _combine_kernel(
    value_ptr: Value,  # [rows] fp32
    id_ptr: Value,  # [rows] int64
    part_value_ptr: Value,  # [rows, SPLITS]
    part_id_ptr: Value,
    threshold_ptr: Value,
    SAMPLED: constexpr,
    SPLITS: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    threshold = float("-inf")
    if SAMPLED:
        threshold = tl.load(threshold_ptr + row)
    if threshold < float("inf"):
        split = tl.arange(0, SPLITS)
        value = tl.load(part_value_ptr + row * SPLITS + split)
        ids = tl.load(part_id_ptr + row * SPLITS + split)
        best = tl.max(value, 0)
        tl.store(value_ptr + row, best)
        tl.store(id_ptr + row, tl.min(tl.where(value == best, ids, 0x7FFFFFFFFFFFFFFF), 0))


def choose(logits: Tensor, first_id: int, choice: Choice, threshold: Tensor, rows: tuple[Tensor, ...]) -> Choice:
    """The arg max, in as many splits as fill the device; `rows` holds temperatures, seeds and positions, or nothing."""
    (num_rows, num_ids), is_sampled = logits.shape, len(rows) > 0
    shift = first_id % 4
    wanted = min(_MAX_SPLITS, _PROGRAMS_PER_SM * num_sms(logits) // max(1, num_rows), cdiv(num_ids + shift, _BLOCK))
    splits = 1 << (max(1, wanted).bit_length() - 1)
    parts = choice
    if splits > 1:
        parts = empty_choice(logits, num_rows, splits)
    temperature, seeds, positions = rows or (threshold, threshold, threshold)
    _choose_kernel[(num_rows, splits)](
        *parts, logits, threshold, temperature, seeds, positions, logits.stride(0), num_ids, first_id,
        cdiv(cdiv(num_ids + shift, splits), _BLOCK) * _BLOCK,
        SHIFT=shift, SAMPLED=is_sampled, SPLITS=splits, BLOCK=_BLOCK, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(num_rows,)](*choice, *parts, threshold, SAMPLED=is_sampled, SPLITS=splits, num_warps=1)
    return choice


def empty_choice(logits: Tensor, *shape: int) -> Choice:
    values = torch.empty(shape, dtype=torch.float32, device=logits.device)
    return values, torch.empty(shape, dtype=torch.int64, device=logits.device)


def launch(logits: Tensor, first_id: int) -> Choice:
    choice = empty_choice(logits, logits.shape[0])
    return choose(logits, first_id, choice, choice[0], ())


def reference(logits: Tensor, first_id: int) -> Choice:
    values, ids = logits.max(dim=-1)
    return values.float(), ids + first_id


def cpu(logits: Tensor, first_id: int) -> Choice:
    return reference(logits, first_id)


def _cost(logits: Tensor, first_id: int) -> costs.OpCost:
    return costs.vocab_argmax(logits.shape[0], logits.shape[1], logits.element_size())


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SASS = ("LDGSTS",)  # the copies ahead


def draw_logits(draw: Draw, num_rows: int, num_ids: int, row_gap: int) -> Tensor:
    """As a model's: a few stand out from the bulk. Behind a row lies the padding of the vocabulary, or of a shard."""
    logits = draw.normal(num_rows, num_ids + row_gap)[:, :num_ids]
    return logits.mul_(2.0) if draw.device == "meta" else logits.mul_(logits.abs())


def _case(
    num_rows: int, num_ids: int, dtype: torch.dtype, first_id: int = 0, row_gap: int = 0, full: bool = False
) -> Case:
    def build(device: str) -> tuple[Tensor, int]:
        return draw_logits(Draw(device, dtype), num_rows, num_ids, row_gap), first_id

    target = (Target(0.93, "memory") if num_rows > 64 else Target(10, "us")) if full else None
    name = f"{DTYPE_NAMES[dtype]} {num_rows}x{num_ids}" + (f" from {first_id}" if first_id else "")
    return Case(name + " strided" * bool(row_gap), dtype, build, SASS if full else (), target)


SMALL = (
    _case(3, 1000, FP32),
    _case(2, 5000, BF16, first_id=5003),
    _case(2, 4096, FP16, row_gap=96),
    _case(1, 17, FP32, first_id=1),
)
FULL = (
    _case(256, 128256, BF16, full=True),
    _case(256, 128256, FP32, full=True),
    _case(256, 151936, BF16, full=True),
    _case(256, 18992, FP16, first_id=18992, full=True),  # one of 8 ranks
    _case(1, 128256, BF16, full=True),
)
LIMIT = (
    "Memory: one pass by 16-byte copies, three tiles ahead; each lane keeps its own best, and the row is reduced "
    "once at the end. Few rows are cut into splits, which costs a second launch."
)
vocab_argmax = Op(
    "vocab_argmax", reference, launch, cpu, _cost, SMALL, FULL,
    limit=LIMIT,
)  # fmt: skip
