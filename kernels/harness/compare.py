"""Runs one case and measures how far its results are from the definition's.

Inputs are poisoned by `kernels.cases`; here outputs are: whatever a launcher allocates holds NaN and lies between
guards, and every argument is compared afterwards too, so that a kernel that leaves an element unwritten, writes one
too many or spoils an input is caught. Knows nothing of any operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cases import guard_size, poison
from kernels.op import Case, Op

_SENTINEL = 96.0  # exact in every dtype; not NaN, because a NaN read out of bounds is often written out of bounds


class GuardedEmpty(TorchDispatchMode):
    """Inside, torch.empty fills floating tensors with NaN, int8 ones with -128, and puts sentinels on both sides."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._guards: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.empty.memory_format or not _is_number(made.dtype) or made.numel() == 0:
            return made
        guard = guard_size(made.shape)
        buffer = torch.full((made.numel() + 2 * guard,), _SENTINEL, dtype=made.dtype, device=made.device)
        self._guards += [buffer[:guard], buffer[guard + made.numel() :]]
        return buffer[guard : guard + made.numel()].view(made.shape).fill_(poison(made.dtype))

    def guards_are_intact(self) -> bool:
        return all(bool((guard == _SENTINEL).all()) for guard in self._guards)


def _is_number(dtype: torch.dtype) -> bool:
    """Approximate by nature; int8 tensors are quantised numbers, other integers are exact."""
    return dtype.is_floating_point or dtype == torch.int8


def row_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst row's ||out - expected||, over all rows' mean ||expected||. Infinite where NaNs do not coincide."""
    if out.shape != expected.shape or out.dtype != expected.dtype:
        return float("inf")
    if not _is_number(out.dtype):
        return 0.0 if torch.equal(out, expected) else float("inf")
    out, expected = (x.double().reshape(-1, x.shape[-1]) for x in (out, expected))
    if not torch.equal(out.isnan(), expected.isnan()):
        return float("inf")
    out, expected = out.nan_to_num(), expected.nan_to_num()
    worst = torch.linalg.vector_norm(out - expected, dim=-1).max()
    return float(worst / torch.linalg.vector_norm(expected, dim=-1).mean().clamp(min=1e-30))


def case_error(op: Op[..., Any], case: Case, run: Callable[..., Any], device: str) -> float:
    """The largest row_error of `run` against the definition, over results and over arguments as they are afterwards."""
    arguments, expected_arguments = case.build(device), case.build(device)
    expected = op.reference(*expected_arguments)
    with GuardedEmpty() as guarded:
        results = run(*arguments)
    if not guarded.guards_are_intact():
        return float("inf")
    pairs = [*zip(_tensors(results), _tensors(expected), strict=True)]
    pairs += zip(_tensors(arguments), _tensors(expected_arguments), strict=True)
    return max(row_error(out, want) for out, want in pairs)


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [value for value in values if isinstance(value, torch.Tensor)]
