"""One choice for each item, the least loss within a budget of bytes: a multiple-choice knapsack.

The greedy solution walks along each item's convex hull, best loss per byte first, and is then improved by single
exchanges; the exact one is for small sums. Pure arithmetic; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store an item."""

    name: str
    num_bytes: int
    loss: float


Items = Mapping[str, Sequence[Choice]]


def choose(items: Items, budget_bytes: int) -> dict[str, Choice] | None:
    """By greed and exchange; None where even the smallest choices are too large."""
    picked = {name: min(choices, key=lambda choice: (choice.num_bytes, choice.loss)) for name, choices in items.items()}
    left = budget_bytes - total_bytes(picked)
    if left < 0:
        return None
    hulls = {name: _hull(choices) for name, choices in items.items()}
    while True:
        steps = [
            (gain / (better.num_bytes - picked[name].num_bytes), name, better)
            for name, hull in hulls.items()
            for better in hull
            if 0 < better.num_bytes - picked[name].num_bytes <= left and (gain := picked[name].loss - better.loss) > 0
        ]
        if not steps:
            break
        _, name, better = max(steps, key=lambda step: step[0])
        left -= better.num_bytes - picked[name].num_bytes
        picked[name] = better
    return _exchange(items, picked, left)


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no mixture of two others beats, by size."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.num_bytes, choice.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(first: Choice, second: Choice) -> float:
    """What a byte more gains."""
    return (first.loss - second.loss) / max(1, second.num_bytes - first.num_bytes)


def _exchange(items: Items, picked: dict[str, Choice], left: int) -> dict[str, Choice]:
    """While another choice for one item, or for two at once, loses less and fits."""
    while True:
        found = _best_exchange(items, picked, left)
        if found is None:
            return picked
        left += sum(picked[name].num_bytes - choice.num_bytes for name, choice in found.items())
        picked = {**picked, **found}


def _best_exchange(items: Items, picked: Mapping[str, Choice], left: int) -> dict[str, Choice] | None:
    moves = [
        (choice.num_bytes - picked[name].num_bytes, choice.loss - picked[name].loss, name, choice)
        for name, choices in items.items()
        for choice in choices
        if choice != picked[name]
    ]
    best, least = None, -1e-15
    for index, (size, loss, name, choice) in enumerate(moves):
        if size <= left and loss < least:
            best, least = {name: choice}, loss
        for other_size, other_loss, other, other_choice in moves[index + 1 :]:
            if other != name and size + other_size <= left and loss + other_loss < least:
                best, least = {name: choice, other: other_choice}, loss + other_loss
    return best


def total_bytes(picked: Mapping[str, Choice]) -> int:
    """Of all items."""
    return sum(choice.num_bytes for choice in picked.values())


def total_loss(picked: Mapping[str, Choice]) -> float:
    """As if losses added up."""
    return sum(choice.loss for choice in picked.values())
