"""What an operation is: a plain definition, a Triton launcher, a fast CPU path, its cost, its cases and its tolerance.

Calling an `Op` dispatches on where its first argument lives. Knows nothing of any particular operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar

import torch

from costs.ops import OpCost

P = ParamSpec("P")
R = TypeVar("R")

# Largest allowed ||row - reference row|| / mean ||reference row||, over all rows of all results.
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True, slots=True)
class Target:
    """What a full case is to reach on an H200. `of` says what `value` is a share of, or the unit that it has.

    "memory" and "gemm" are the ceilings measured in the same run, "peer" the fastest peer of that row; "us" is an upper
    bound, all others are lower bounds.
    """

    value: float
    of: Literal["memory", "gemm", "peer", "TFLOP/s", "us"]


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments for one call. `build` draws them on "cpu", "cuda" or "meta", the same values for the same device."""

    name: str
    dtype: torch.dtype  # of the activations: what the tolerance is looked up by
    build: Callable[[str], tuple[Any, ...]]
    sass: tuple[str, ...] = ()  # beginnings of instructions that its compiled kernels must have between them
    target: Target | None = None


@dataclass(frozen=True, slots=True)
class Op(Generic[P, R]):
    name: str
    reference: Callable[Concatenate[torch.Tensor, P], R]  # the definition: plain torch, float64 inside
    launch: Callable[
        Concatenate[torch.Tensor, P], R
    ]  # Triton; never looks at tensor values, so it runs on meta tensors
    cpu: Callable[Concatenate[torch.Tensor, P], R]
    cost: Callable[Concatenate[torch.Tensor, P], OpCost]
    small: tuple[Case, ...]  # seconds in the interpreter: ragged, tails, odd sizes
    full: tuple[Case, ...]  # production shapes: compiled on paper, compared and timed on a GPU
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)
    limit: str = ""  # one line for the static table: what bounds it on sm_90, and what was tried

    def __call__(self, first: torch.Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if first.is_cuda:
            return self.launch(first, *args, **kwargs)
        return self.cpu(first, *args, **kwargs)
