"""Whether an adapter fits the model: each module that it changes is there, in the sizes that its matrices have.

Knows nothing of files, or of how workers compute with an adapter.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checkpoint.adapters.directory import TENSORS_NAME, Adapter
from checkpoint.errors import CheckpointError

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]*)(?=\.)")


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """Linear modules of the model that are alike but for numbers in their names, as those of its layers."""

    name: str
    """model.layers.*.self_attn.q_proj; a * for each number."""
    numbers: tuple[tuple[int, int], ...]
    """First and last of each, both included."""
    outputs: int
    """Rows of the matrix."""
    inputs: int
    """Its columns."""


def targets_of(sizes: Mapping[str, tuple[int, int]]) -> tuple[AdapterTarget, ...]:
    """The modules of a model, few for many. sizes: [outputs, inputs] by name."""
    groups: dict[tuple[str, tuple[int, int]], list[tuple[int, ...]]] = {}
    for name, size in sizes.items():
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        groups.setdefault((_NUMBER.sub("*", name), size), []).append(numbers)
    return tuple(
        AdapterTarget(pattern, ranges, *size)
        for (pattern, size), members in groups.items()
        for ranges in _boxes(members)
    )


def check_fits(adapter: Adapter, targets: Sequence[AdapterTarget], max_rank: int) -> None:
    """Raise CheckpointError, which names the file and the tensor, unless the model has all modules of the adapter."""
    path = adapter.directory / TENSORS_NAME
    for module in adapter.modules:
        target = _target(module.name, targets)
        if target is None:
            raise CheckpointError(f"{path}: {module.a.name}: the model has no linear module {module.name}")
        for tensor, stored, wanted, what in (
            (module.a, module.inputs, target.inputs, "inputs"),
            (module.b, module.outputs, target.outputs, "outputs"),
        ):
            if stored != wanted:
                raise CheckpointError(
                    f"{path}: {tensor.name} is {list(tensor.shape)}, and {module.name} of the model has {wanted}"
                    f" {what}: it is an adapter of another model"
                )
        if module.rank > max_rank:
            raise CheckpointError(
                f"{path}: {module.a.name}: rank {module.rank} is more than {max_rank} (max_lora_rank)"
            )


def _target(module: str, targets: Sequence[AdapterTarget]) -> AdapterTarget | None:
    pattern, numbers = _NUMBER.sub("*", module), [int(number) for number in _NUMBER.findall(module)]
    if "*" in module:  # stands for a number in a target's name, and is none itself
        return None
    for target in targets:
        if target.name == pattern and all(
            first <= number <= last for number, (first, last) in zip(numbers, target.numbers, strict=True)
        ):
            return target
    return None


def _boxes(members: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, int], ...]]:
    """Ranges of numbers that have these members and no others: one box, or one for each run along the first number."""
    box = tuple((min(column), max(column)) for column in zip(*members, strict=True))
    if math.prod(last - first + 1 for first, last in box) == len(members):
        return [box]
    ordered = sorted(members)
    rest = {first: [one[1:] for one in group] for first, group in itertools.groupby(ordered, key=lambda one: one[0])}
    runs: list[list[int]] = []
    for first, members_below in rest.items():
        if runs and first == runs[-1][-1] + 1 and members_below == rest[runs[-1][-1]]:
            runs[-1].append(first)
        else:
            runs.append([first])
    return [((run[0], run[-1]), *below) for run in runs for below in _boxes_below(rest[run[0]])]


def _boxes_below(members: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, int], ...]]:
    return _boxes(members) if members[0] else [()]
