"""What each product's matrices lose under each scheme, by themselves: the plain model with only those compressed.

Measured is the KL divergence from the plain model on calibration blocks, in nats: it has far less noise than the loss
of the text's own tokens. The products of one layer share a pass up to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from compress.calibration.statistics import LayerRecorder
from compress.calibration.tapped import Replaced, TappedFormat
from compress.calibration.walk import ModelWalk
from compress.layer import LayerWeights, compress_layer, meant_weights, read_layer
from compress.layerwise import check_layer, input_rounding
from compress.loss import compare
from compress.recipe import Recipe
from compress.schemes import PLAIN, Scheme
from compress.selection.knapsack import Choice
from workers.model.weight_format import Matrices


def sensitivities(
    walk: ModelWalk,
    recipe: Recipe,
    schemes: Sequence[Scheme],
    blocks: Tensor,
    on_layer: Callable[[int], None],
    statistics_blocks: Tensor,
) -> dict[str, list[Choice]]:
    """By item_of: a choice for each scheme.

    recipe: how weights are rounded. blocks: KL divergence is measured on these; methods see statistics_blocks.
    """
    for scheme in schemes:
        for index in range(walk.model.num_hidden_layers):
            check_layer(walk, replace(recipe, scheme=scheme), index)
    measure = _Measurement(walk, recipe, blocks)
    x, seen = walk.enter(blocks), walk.enter(statistics_blocks)
    found: dict[str, list[Choice]] = {}
    for index in range(walk.model.num_hidden_layers):
        recorder = LayerRecorder(True, walk.device)
        seen = walk.through(walk.layer(index, TappedFormat(recorder.tap)), index, seen)
        layer = read_layer(walk.model, walk.weights, index)
        layer.statistics = {matrices.names: recorder.of(matrices) for matrices in layer.matrices}
        for item, group in items_of(layer.matrices).items():
            found[item] = [measure.choice(index, layer, group, scheme, x) for scheme in schemes]
        x = walk.through(walk.plain_layer(index), index, x)
        on_layer(index + 1)
    return found


class _Measurement:
    """Against the plain model's hidden states behind the last layer."""

    def __init__(self, walk: ModelWalk, recipe: Recipe, blocks: Tensor) -> None:
        self._walk, self._recipe, self._blocks = walk, recipe, blocks
        self._plain = self._rest(0, walk.enter(blocks))

    def _rest(self, first: int, x: Tensor) -> Tensor:
        """Through the plain layers from `first` on."""
        for index in range(first, self._walk.model.num_hidden_layers):
            x = self._walk.through(self._walk.plain_layer(index), index, x)
        return x

    def choice(self, index: int, layer: LayerWeights, group: Sequence[Matrices], scheme: Scheme, x: Tensor) -> Choice:
        """x: hidden states before the layer."""
        num_bytes = group_bytes(group, scheme)
        if scheme == PLAIN:
            return Choice(scheme.label, num_bytes, 0.0)
        recipe = only(self._recipe, group, scheme)
        tensors = compress_layer(self._walk.model, _copy(layer), recipe, index).tensors
        given: Mapping[str, Tensor] = meant_weights(layer, tensors, recipe)
        weights = Replaced(self._walk.weights, given)
        made = self._walk.layer(index, TappedFormat(input_rounding(recipe, tensors)), weights)
        behind = self._rest(index + 1, self._walk.through(made, index, x))
        loss = compare(self._walk, self._blocks, self._plain, behind)
        return Choice(scheme.label, num_bytes, max(loss.kl_nats, 0.0))


def item_of(matrices: Matrices) -> str:
    """What is chosen for together: the matrices of a product, and those of all experts of a layer."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", matrices.names[0])


def items_of(layer: Sequence[Matrices]) -> dict[str, list[Matrices]]:
    """By item_of."""
    items: dict[str, list[Matrices]] = {}
    for matrices in layer:
        items.setdefault(item_of(matrices), []).append(matrices)
    return items


def group_bytes(group: Sequence[Matrices], scheme: Scheme) -> int:
    """Stored for them."""
    bits = sum(scheme.bits_of(outputs, matrices.inputs) for matrices in group for _, outputs in matrices.tensors())
    return bits // 8


def only(recipe: Recipe, group: Sequence[Matrices], scheme: Scheme) -> Recipe:
    """The recipe for these matrices alone."""
    schemes = tuple((name, scheme) for matrices in group for name in matrices.names)
    return replace(recipe, scheme=PLAIN, schemes=schemes)


def _copy(layer: LayerWeights) -> LayerWeights:
    return LayerWeights(layer.matrices, dict(layer.weights), layer.dtypes, dict(layer.others), dict(layer.statistics))
