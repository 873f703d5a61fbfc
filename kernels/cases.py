"""Draws arguments for cases: numbers inside larger poisoned buffers, and paged caches whose unused parts are NaN.

A kernel that reads outside a tensor, past a sequence's end or in a block that is not its own meets a NaN and fails its
comparison. On "meta" nothing is drawn. Knows nothing of any operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.jit import cdiv

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
}
_INT8_POISON = -128  # int8 knows no NaN; this is the one value that a symmetric quantisation never gives


@dataclass(frozen=True, slots=True)
class PagedShape:
    """A batch over a paged cache. `query_lens` is empty for decode: one query token each."""

    seq_lens: tuple[int, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    query_lens: tuple[int, ...] = ()

    def name(self, dtype: torch.dtype) -> str:
        parts = [DTYPE_NAMES[dtype], f"heads{self.num_q_heads}-{self.num_kv_heads}", f"dim{self.head_dim}"]
        parts.append(f"block{self.block_size}")
        if self.query_lens:
            parts.append(f"query{_numbers(self.query_lens)}")
        return " ".join([*parts, f"len{_numbers(self.seq_lens)}"])


def guard_size(shape: Sequence[int]) -> int:
    """Elements to put on each side of a tensor: a row of its first dimension at least; keeps 16-byte alignment."""
    return cdiv(max(1, torch.Size(shape[1:]).numel()), 256) * 256


def poison(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else _INT8_POISON


def _numbers(values: Sequence[int]) -> str:
    if len(set(values)) == 1:
        return f"{values[0]}x{len(values)}"
    return ",".join(map(str, values)) if len(values) <= 8 else f"{min(values)}..{max(values)}x{len(values)}"


class Draw:
    """A seeded source of tensors on one device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or self.dtype
        if self._generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        count, guard = torch.Size(shape).numel(), guard_size(shape)
        buffer = torch.full((count + 2 * guard,), poison(dtype), dtype=dtype, device=self.device)
        tensor = buffer[guard : guard + count].view(shape)
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float32, device=self.device)
        return tensor.copy_(drawn.mul_(40).round_().clamp_(-127, 127) if dtype == torch.int8 else drawn)

    def bits(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Integers in which every bit is random: packed codes."""
        width = 8 * dtype.itemsize
        low = -(1 << (width - 1)) if dtype.is_signed else 0
        return self._uniform(low, low + (1 << width), shape, dtype)

    def below(self, end: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Integers 0 .. end - 1."""
        return self._uniform(0, end, shape, dtype)

    def _uniform(self, low: int, end: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        count, guard = torch.Size(shape).numel(), guard_size(shape)
        # No integer is NaN: outside lies the type's largest, which is a wrong code, scale or index.
        buffer = torch.full((count + 2 * guard,), torch.iinfo(dtype).max, dtype=dtype, device=self.device)
        tensor = buffer[guard : guard + count].view(shape)
        return tensor.copy_(torch.randint(low, end, shape, generator=self._generator, device=self.device))

    def integers(self, values: Sequence[int] | torch.Tensor, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.as_tensor(values).to(dtype).to(self.device)

    def permutation(self, n: int) -> torch.Tensor:
        """A shuffle of range(n), on the CPU: block numbers are decided by the host."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(n))

    def paged_cache(
        self, shape: PagedShape, dtype: torch.dtype | None = None, window: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """kv_cache, block_table, seq_lens. The last block belongs to nobody; the table's unused entries point at it.

        Unused is also what lies before the window of a sequence's first query.
        """
        num_blocks = [cdiv(n, shape.block_size) for n in shape.seq_lens]
        nobody = sum(num_blocks)
        table = torch.full((len(num_blocks), max(num_blocks) + 1), nobody)
        free = self.permutation(nobody)
        for row, count in zip(table, num_blocks, strict=True):
            row[:count], free = free[:count], free[count:]
        size = (nobody + 1, shape.num_kv_heads, 2, shape.block_size, shape.head_dim)
        kv_cache = self.normal(*size, dtype=dtype)
        if self._generator is not None:
            kv_cache[nobody] = poison(kv_cache.dtype)
            for row, count, length in zip(table.tolist(), num_blocks, shape.seq_lens, strict=True):
                if length % shape.block_size:
                    kv_cache[row[count - 1], :, :, length % shape.block_size :] = poison(kv_cache.dtype)
            for i, row in enumerate(table):
                num_queries = shape.query_lens[i] if shape.query_lens else 1
                unseen = max(0, shape.seq_lens[i] - num_queries + 1 - window) if window else 0
                first_block, num_slots = divmod(unseen, shape.block_size)
                row[:first_block] = nobody
                kv_cache[row[first_block], :, :, :num_slots] = poison(kv_cache.dtype)
        return kv_cache, self.integers(table), self.integers(shape.seq_lens)

    def channel_scales(self, kv_heads: int, head_dim: int) -> torch.Tensor:
        """As kernels.kv.packed_blocks has them."""
        scales = self.normal(kv_heads, 2, 2, head_dim, dtype=torch.float32)
        if self._generator is not None:
            scales[:, :, 0].abs_().add_(0.5)
        return scales

    def kv_scales(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """fp8: [kv_heads, 2], of a head. int8: [blocks, kv_heads, 2, block_size], of a slot; NaN where it is unused."""
        if kv_cache.dtype != torch.int8:
            return self.normal(kv_cache.shape[1], 2, dtype=torch.float32).abs_().add_(0.5)
        scales = self.normal(*kv_cache.shape[:-1], dtype=torch.float32).abs_().add_(0.5).mul_(1 / 40)
        if self._generator is not None:
            scales[kv_cache[..., 0] == _INT8_POISON] = float("nan")
        return scales
