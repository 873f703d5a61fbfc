"""Mixed precision: for each product the scheme that a knapsack picks within a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from compress.calibration.blocks import TokenBlocks
from compress.errors import CompressError
from compress.job import PlainModel
from compress.recipe import Recipe
from compress.schemes import Scheme, scheme_labelled
from compress.selection.knapsack import Items, choose, total_bytes, total_loss
from compress.selection.sensitivity import item_of, sensitivities
from workers.model.tensor_layout import tensor_layout

_MEASURED_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class MixedRecipe:
    """A recipe, and what it should come to if losses add up."""

    recipe: Recipe
    predicted_kl_nats: float | None  # None: nothing was mixed
    weight_bytes: int = 0


@torch.no_grad()
def measure(
    model: PlainModel, recipe: Recipe, schemes: Sequence[Scheme], blocks: TokenBlocks, on_layer: Callable[[int], None]
) -> Items:
    """What each product loses under each scheme, on calibration blocks that the methods do not see meanwhile: on those
    that they see they look better than they are."""
    count = min(_MEASURED_BLOCKS, max(1, len(blocks.calibration) // 4))
    if len(blocks.calibration) < 2:
        raise CompressError("--budget needs at least two calibration blocks; give --calibration")
    seen, measured = blocks.calibration[:-count], blocks.calibration[-count:]
    return sensitivities(model.walk, recipe, schemes, measured, on_layer, seen)


def mixed_recipe(model: PlainModel, recipe: Recipe, items: Items, budget_bytes: int) -> MixedRecipe:
    """budget_bytes: of all weights, those outside of layers too. Raises CompressError when nothing is that small."""
    ends = end_bytes(model)
    picked = choose(items, budget_bytes - ends)
    if picked is None:
        least = ends + sum(min(choice.num_bytes for choice in choices) for choices in items.values())
        raise CompressError(f"--budget {budget_bytes}: the smallest choices take {least} bytes")
    schemes: list[tuple[str, Scheme]] = []
    for matrices in tensor_layout(model.config).matrices:
        scheme = scheme_labelled(picked[item_of(matrices)].name)
        schemes += [(name, scheme) for name in matrices.names]
    made = replace(recipe, schemes=tuple(schemes))
    return MixedRecipe(made, total_loss(picked), total_bytes(picked) + ends)


def end_bytes(model: PlainModel) -> int:
    """Of all tensors but the layers' matrices, as they are stored."""
    sizes = {"F64": 8, "F32": 4}
    matrices = {name + ".weight" for group in tensor_layout(model.config).matrices for name in group.names}
    total = 0
    for name, tensor in model.stored.items():
        if name not in matrices:
            count = 1
            for size in tensor.shape:
                count *= size
            total += count * sizes.get(tensor.dtype, 2)
    return total
