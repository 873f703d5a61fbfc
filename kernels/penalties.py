"""Penalties on tokens that a request has seen: logits are changed in place, before sampling.

A seen token's logit is divided by the repetition penalty if positive, else multiplied by it. Then, for a token of the
completion, presence + frequency * its occurrences is subtracted. `counts` says what each slot's request has seen, in
this shard of the vocabulary: twice the occurrences in the completion, plus one if the prompt has the token.
`count_rows` names the slot of each row of logits; -1 leaves a row alone, and costs nothing. Knows nothing of requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, tl
from kernels.op import Case, Op, Target

_BLOCK = 4096


@jit
def _penalties_kernel(
    logits_ptr: Value,  # [rows, num_ids]
    counts_ptr: Value,  # [slots, num_ids] int32
    count_row_ptr: Value,  # [rows] int64
    repetition_ptr: Value,  # [rows] fp32, and the next two
    presence_ptr: Value,
    frequency_ptr: Value,
    stride: Value,
    stride_counts: Value,
    num_ids: Value,
    BLOCK: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(count_row_ptr + row)
    if slot >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + slot * stride_counts + column, mask=column < num_ids, other=0)
        seen = counts > 0  # few are: of the logits only their sectors move
        logit_ptrs = logits_ptr + row * stride + column
        x = tl.load(logit_ptrs, mask=seen, other=0.0).to(tl.float32)
        repetition = tl.load(repetition_ptr + row)
        x = tl.where(x > 0, x / repetition, x * repetition)
        times = counts >> 1
        penalty = tl.load(presence_ptr + row) + tl.load(frequency_ptr + row) * times.to(tl.float32)
        x = tl.where(times > 0, x - penalty, x)
        tl.store(logit_ptrs, x.to(logits_ptr.dtype.element_ty), mask=seen)


def launch(
    logits: Tensor, counts: Tensor, count_rows: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    num_rows, num_ids = logits.shape
    _penalties_kernel[(num_rows, cdiv(num_ids, _BLOCK))](
        logits, counts, count_rows, repetition, presence, frequency, logits.stride(0), counts.stride(0), num_ids,
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return logits


def _penalised(
    logits: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor, dtype: torch.dtype
) -> Tensor:
    x, times = logits.to(dtype), counts >> 1
    repetition, presence, frequency = (p.to(dtype)[:, None] for p in (repetition, presence, frequency))
    x = torch.where(counts > 0, torch.where(x > 0, x / repetition, x * repetition), x)
    return torch.where(times > 0, x - (presence + frequency * times), x).to(logits.dtype)


def reference(
    logits: Tensor, counts: Tensor, count_rows: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    for i, slot in enumerate(count_rows.tolist()):
        if slot >= 0:
            here, there = slice(i, i + 1), slice(slot, slot + 1)
            parameters = repetition[here], presence[here], frequency[here]
            logits[here] = _penalised(logits[here], counts[there], *parameters, dtype=torch.float64)
    return logits


def cpu(
    logits: Tensor, counts: Tensor, count_rows: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    rows = (count_rows >= 0).nonzero()[:, 0]
    parameters = repetition[rows], presence[rows], frequency[rows]
    logits[rows] = _penalised(logits[rows], counts[count_rows[rows]], *parameters, dtype=torch.float32)
    return logits


def _cost(
    logits: Tensor, counts: Tensor, count_rows: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> costs.OpCost:
    num_penalised = int((count_rows >= 0).sum())
    return costs.apply_penalties(num_penalised, logits.shape[1])


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _case(num_rows: int, num_ids: int, dtype: torch.dtype, row_gap: int = 0, full: bool = False) -> Case:
    """Every fourth row has no penalties; a thousandth of the vocabulary is seen, and in small cases a third."""

    def build(device: str) -> tuple[Tensor, ...]:
        draw = Draw(device, dtype)
        logits = draw.normal(num_rows, num_ids + row_gap)[:, :num_ids]
        slots = draw.permutation(num_rows + 2)[:num_rows]
        slots[3::4] = -1
        if device == "meta":
            counts = torch.empty(num_rows + 2, num_ids, dtype=torch.int32, device=device)
        else:
            drawn = draw.normal(num_rows + 2, num_ids, dtype=FP32)
            counts = (drawn - (3.0 if full else 0.4)).mul_(4.0).ceil_().clamp_(min=0).int()
        parameters = [draw.normal(num_rows, dtype=FP32).abs_() for _ in range(2)]
        repetition = draw.normal(num_rows, dtype=FP32).abs_().add_(0.5)
        return logits, counts, draw.integers(slots, torch.int64), repetition, *parameters

    name = f"{DTYPE_NAMES[dtype]} {num_rows}x{num_ids}" + " strided" * bool(row_gap)
    target = (Target(0.8, "memory") if num_rows > 64 else Target(4.0, "us")) if full else None
    return Case(name, dtype, build, ("LDG.E.128",) if full else (), target)


SMALL = (_case(3, 1000, FP32), _case(5, 500, BF16, row_gap=4), _case(2, 5000, FP16))
FULL = (
    _case(256, 128256, BF16, full=True),
    _case(256, 151936, FP32, full=True),
    _case(8, 128256, FP16, full=True),
)

LIMIT = (
    "Memory: the counts are read whole, the logits only where a token was seen. A list of seen tokens would read less,"
    " but its length differs by request and it must not name a token twice."
)

apply_penalties = Op("apply_penalties", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
