"""Makes Triton's interpreter compute bf16 and fp8 by value.

The stock interpreter (3.6) keeps bf16 and fp8 as integers of the same width. It does arithmetic on those integers,
truncates when it narrows to bf16, and carries wrongly when it narrows to fp8. Here every operation that computes is
wrapped: operands in these types are widened to fp32, the stock operation runs, and the result is rounded back, to
nearest even and saturating in fp8 as the GPU's conversions do. Moves of bits (load, store, select, reshape, bitcast)
need nothing.

For a process with TRITON_INTERPRET=1, before the first launch. Left out: bf16 atomics, inline assembly, libdevice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_NARROW = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_STORAGE = {1: np.uint8, 2: np.uint16}  # how the interpreter keeps a narrow number of so many bytes


def _is_narrow(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar in _NARROW


def _widen(handle: Any) -> Any:
    if not _is_narrow(handle):
        return handle
    bits = torch.from_numpy(np.ascontiguousarray(handle.data))
    return interpreter.TensorHandle(bits.view(_NARROW[handle.dtype.scalar]).float().numpy(), tl.float32)


def _narrow(handle: Any, dtype: Any) -> Any:
    if dtype not in _NARROW:
        return handle
    values = torch.from_numpy(np.ascontiguousarray(handle.data)).float()
    target = _NARROW[dtype]
    if target.itemsize == 1:
        largest = torch.finfo(target).max
        values = values.clamp(-largest, largest)  # NaN stays NaN
    bits = values.to(target).view(torch.uint8 if target.itemsize == 1 else torch.int16).numpy()
    return interpreter.TensorHandle(bits.view(_STORAGE[target.itemsize]), dtype)


def _by_value(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a builder method whose result has the type of its last tensor operand; comparisons give truth values."""

    def compute(self: Any, *operands: Any) -> Any:
        handles = [x for x in operands if isinstance(x, interpreter.TensorHandle)]
        if not any(map(_is_narrow, handles)):
            return stock(self, *operands)
        result = stock(self, *map(_widen, operands))
        return result if result.data.dtype == np.bool_ else _narrow(result, handles[-1].dtype.scalar)

    return compute


def _cast_by_value(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a conversion (operand, new type, and perhaps a rounding mode)."""

    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        if not _is_narrow(source) and target.scalar not in _NARROW:
            return stock(self, source, target, *rounding)
        wide = _widen(source)
        if target.scalar in _NARROW:
            return _narrow(wide, target.scalar)
        return interpreter.InterpreterBuilder.cast_impl(self, wide, target)

    return cast


def _reduce_by_value(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a reduction or scan: it takes a tuple of tensors and gives one result for each."""

    def reduce(self: Any, inputs: Any) -> Any:
        if not any(_is_narrow(x.handle) for x in inputs):
            return stock(self, inputs)
        semantic = interpreter.interpreter_semantic
        wide = tuple(semantic.cast(x, tl.float32) if _is_narrow(x.handle) else x for x in inputs)
        results = stock(self, wide)
        results = results if isinstance(results, (list, tuple)) else [results]
        return [
            semantic.cast(result, x.dtype) if _is_narrow(x.handle) and result.dtype == tl.float32 else result
            for result, x in zip(results, inputs, strict=True)
        ]

    return reduce


def repair() -> None:
    """Wrap the interpreter's methods; a second call changes nothing."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "computes_by_value", False):
        return
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot", "create_rsqrt", "create_erf"):
        setattr(builder, name, _by_value(getattr(builder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _cast_by_value(getattr(builder, name)))
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _reduce_by_value(operation.apply_impl)
    builder.computes_by_value = True
