"""Embedding look-up in one shard of the vocabulary.

A token of another shard gives zeros, so that the ranks' results add up to the whole. One program per token. Knows
nothing of groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op, Target


@jit
def _embedding_kernel(
    out_ptr: Value,  # [tokens, HIDDEN]
    weight_ptr: Value,  # [num_ids, HIDDEN]
    token_ptr: Value,  # [tokens]
    stride: Value,
    first_id: Value,
    num_ids: Value,
    HIDDEN: constexpr,
    BLOCK: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    weight_row = tl.load(token_ptr + row).to(tl.int64) - first_id
    column = tl.arange(0, BLOCK)
    is_here = (weight_row >= 0) & (weight_row < num_ids)
    x = tl.load(weight_ptr + weight_row * stride + column, mask=is_here & (column < HIDDEN), other=0.0)
    tl.store(out_ptr + row * HIDDEN + column, x, mask=column < HIDDEN)


def launch(weight: Tensor, token_ids: Tensor, first_id: int) -> Tensor:
    num_tokens, (num_ids, hidden) = token_ids.shape[0], weight.shape
    out = torch.empty(num_tokens, hidden, dtype=weight.dtype, device=weight.device)
    block = next_power_of_2(hidden)
    _embedding_kernel[(num_tokens,)](
        out, weight, token_ids, weight.stride(0), first_id, num_ids,
        HIDDEN=hidden, BLOCK=block, num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return out


def reference(weight: Tensor, token_ids: Tensor, first_id: int) -> Tensor:
    out = torch.zeros(token_ids.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
    for row, token in enumerate(token_ids.tolist()):
        if first_id <= token < first_id + weight.shape[0]:
            out[row] = weight[token - first_id]
    return out


def cpu(weight: Tensor, token_ids: Tensor, first_id: int) -> Tensor:
    rows = token_ids - first_id
    is_here = (rows >= 0) & (rows < weight.shape[0])
    if bool(is_here.all()):
        return F.embedding(rows, weight)
    return F.embedding(torch.where(is_here, rows, 0), weight).masked_fill_(~is_here[:, None], 0.0)


def _cost(weight: Tensor, token_ids: Tensor, first_id: int) -> costs.OpCost:
    return costs.embedding(token_ids.shape[0], weight.shape[1], weight.element_size())


def _case(
    num_tokens: int,
    num_ids: int,
    hidden: int,
    dtype: torch.dtype,
    first_id: int = 0,
    vocab: int = 0,
    full: bool = False,
) -> Case:
    def build(device: str) -> tuple[Tensor, Tensor, int]:
        draw = Draw(device, dtype)
        tokens = draw.permutation(max(vocab, num_ids, num_tokens))[:num_tokens] % max(vocab, num_ids)
        return draw.normal(num_ids, hidden), draw.integers(tokens, torch.int64), first_id

    target = None
    if full and dtype != FP32:
        target = Target(0.93, "memory") if num_tokens >= 8192 else Target(2.5, "us")
    name = f"{DTYPE_NAMES[dtype]} tokens{num_tokens} {num_ids}x{hidden}" + (f" from {first_id}" if first_id else "")
    return Case(name, dtype, build, ("LDG.E.128", "STG.E.128") if full else (), target)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

SMALL = (
    _case(5, 40, 256, FP32),
    _case(9, 16, 96, BF16, first_id=16, vocab=48),
    _case(3, 7, 63, FP16, first_id=7, vocab=20),
)
FULL = (
    _case(8192, 128256, 4096, BF16, full=True),
    _case(64, 128256, 4096, BF16, full=True),
    _case(8192, 16032, 8192, FP16, first_id=16032, vocab=128256, full=True),  # one of 8 ranks
    _case(64, 16032, 8192, FP32, first_id=16032, vocab=128256, full=True),
)

LIMIT = (
    "Memory: one row a program. The row's address waits for the token's id; at 64 tokens those two latencies and the"
    " launch are all. A shard writes zeros for most tokens and reads nothing for them, so it beats its cost's floor."
)

vocab_embedding = Op("vocab_embedding", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
