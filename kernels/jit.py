"""The one door to Triton: `jit`, `tl`, and names for kernel annotations.

Importing it touches no driver and needs no GPU. Triton has no wheels for some platforms; there the kernels stay plain
functions that nobody launches, and the CPU paths work. Knows nothing of any operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

__all__ = ["Value", "box", "cdiv", "constexpr", "jit", "next_power_of_2", "num_sms", "tl"]

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None

if TYPE_CHECKING or tl is None:
    Value: TypeAlias = Any
    constexpr: TypeAlias = Any
else:  # Triton looks annotations up and needs its own names there
    Value = tl.tensor  # what a kernel computes with: a pointer, a scalar, a tile
    constexpr = tl.constexpr

NUM_SMS_ON_PAPER = 132  # H100 and H200; for tensors that are on no device


def jit(kernel: Callable[..., Any]) -> Any:
    return triton.jit(kernel) if triton is not None else kernel


def box(tensor: torch.Tensor, shape: list[int]) -> Any:
    """The tensor as the copy engine sees it, in boxes of this shape. Rows must begin at multiples of 16 bytes."""
    return TensorDescriptor.from_tensor(tensor, shape)


@cache
def _num_sms_of_device(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def num_sms(tensor: torch.Tensor) -> int:
    return _num_sms_of_device(tensor.get_device()) if tensor.is_cuda else NUM_SMS_ON_PAPER


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
