"""The tensors that objects of the model hold: found, described, and put aside for others while their code is traced.

Layers of one kind hold tensors of the same shapes at the same places, so that one compiled code serves all of them.
Knows nothing of what the objects are for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


class NotDescribed(Exception):
    """What code depends on cannot be told."""


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor at its place."""

    owner: Any
    name: str
    tensor: Tensor
    is_dynamic: bool
    """Whether its first dimension counts for nothing in the code."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the code of some objects depends on: their tensors apart, two of the same description are one code."""

    tensors: tuple[Held, ...]
    rest: tuple[str, ...]
    """Types, numbers and the tensors' shapes, each with its place."""
    types: frozenset[type]
    """Of the objects and of what they hold."""


def describe(
    objects: Sequence[Any], known: tuple[type, ...], opaque: tuple[type, ...] = (), dynamic: tuple[type, ...] = ()
) -> Description:
    """known: types of the objects, and of what they hold. opaque: those that are passed over. dynamic: those whose
    tensors may have any number of rows.

    Raises NotDescribed for an object of another type.
    """
    walk = _Walk(known, opaque, dynamic)
    for index, root in enumerate(objects):
        walk.visit(root, str(index))
    return Description(tuple(walk.tensors), tuple(walk.rest), frozenset(walk.types))


@dataclass(slots=True)
class _Walk:
    known: tuple[type, ...]
    opaque: tuple[type, ...]
    dynamic: tuple[type, ...]
    tensors: list[Held] = dataclasses.field(default_factory=list)
    rest: list[str] = dataclasses.field(default_factory=list)
    types: set[type] = dataclasses.field(default_factory=set)
    seen: dict[int, str] = dataclasses.field(default_factory=dict)

    def visit(self, value: Any, place: str) -> None:
        """An object, and what it holds."""
        if id(value) in self.seen:
            self.rest.append(f"{place}={self.seen[id(value)]}")
            return
        self.rest.append(f"{place}:{type(value).__qualname__}")
        if isinstance(value, self.opaque):
            return
        if type(value) not in (*self.known, *self.dynamic, list, tuple):
            raise NotDescribed(f"there is no compiled form of {type(value).__qualname__}")
        self.seen[id(value)] = place
        self.types.add(type(value))
        for name, part in _parts(value, place):
            inner = f"{place}.{name}"
            if isinstance(part, Tensor):
                self._add(Held(value, name, part, isinstance(value, self.dynamic)), inner)
            elif isinstance(part, _PLAIN):
                self.rest.append(f"{inner}={part!r}")
            else:
                self.visit(part, inner)

    def _add(self, held: Held, place: str) -> None:
        tensor = held.tensor
        shape = ("*", *tensor.shape[1:]) if held.is_dynamic else tuple(tensor.shape)
        self.tensors.append(held)
        self.rest.append(f"{place}:{tensor.dtype} {shape} {'packed' if tensor.is_mkldnn else tensor.stride()}")


def _parts(value: Any, place: str) -> list[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        if any(isinstance(part, Tensor) for part in value):
            raise NotDescribed(f"{place} is a sequence of tensors")
        return [(str(index), part) for index, part in enumerate(value)]
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return sorted(vars(value).items())


@contextmanager
def in_place_of(held: Sequence[Held], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Others while the context lasts."""
    try:
        for place, tensor in zip(held, tensors, strict=True):
            object.__setattr__(place.owner, place.name, tensor)  # also in a frozen dataclass
        yield
    finally:
        for place in held:
            object.__setattr__(place.owner, place.name, place.tensor)
