"""Compresses the matrices of one layer by a recipe. Knows nothing of files or of other layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calibration.statistics import InputStatistics
from compress.errors import CompressError
from compress.folding import Fold, fold_into, folds_of
from compress.gguf.blocks.quantise import quantise
from compress.methods.gptq import gptq
from compress.methods.low_rank import factorized, rank_of
from compress.methods.nearest import round_to_nearest
from compress.methods.pruning import prune
from compress.methods.smoothing import Consumers, awq_factors, clip_to_best_range, smoothquant_factors
from compress.recipe import Recipe
from compress.rounded import RoundedMatrix
from compress.schemes import Scheme
from compress.stored import StoredModel
from workers.model.config import ModelConfig
from workers.model.loader import Weights
from workers.model.tensor_layout import TensorLayout
from workers.model.weight_format import Matrices

KeyOfMatrices = tuple[str, ...]


@dataclass(slots=True)
class LayerWeights:
    """A layer's tensors while it is worked on."""

    matrices: list[Matrices]
    weights: dict[str, Tensor]  # fp32 [outputs, inputs], by the name of the matrix
    dtypes: dict[str, torch.dtype]  # of the checkpoint, by the name of the matrix
    others: dict[str, Tensor]  # norms and the like, as stored, by the whole name
    statistics: dict[KeyOfMatrices, InputStatistics]  # of the matrices' inputs; empty without calibration


@dataclass(frozen=True, slots=True)
class CompressedLayer:
    """What a layer became."""

    tensors: dict[str, Tensor]  # as they are stored
    errors: dict[str, float]
    """Of each matrix: squared change of its output over its squared output; without calibration of the weights."""


def read_layer(model: ModelConfig, weights: Weights, index: int) -> LayerWeights:
    """A layer of the plain checkpoint."""
    layout = TensorLayout(model.weight_format)
    model.decoder.add_tensors(layout, model.hidden_size, index)
    read: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    others = {name: want.shape for name, want in layout.wanted.items() if not want.is_optional}
    optional = {name: weights.shape_of(name) for name, want in layout.wanted.items() if want.is_optional}
    others |= {name: shape for name, shape in optional.items() if shape is not None}
    for matrices in layout.matrices:
        for name, outputs in matrices.tensors():
            others.pop(name + ".weight")
            stored = weights.read(name + ".weight", (outputs, matrices.inputs), as_stored=True)
            read[name], dtypes[name] = stored.float(), stored.dtype
    plain = {name: weights.read(name, shape, as_stored=True) for name, shape in others.items()}
    return LayerWeights(layout.matrices, read, dtypes, plain, {})


def compress_layer(model: ModelConfig, layer: LayerWeights, recipe: Recipe, index: int) -> CompressedLayer:
    """Changes `layer`."""
    if recipe.smoothing != "none":
        folds = folds_of(model, layer.matrices, index)
        for fold in folds:
            _smooth(model, layer, recipe, fold)
    tensors, errors, stored = dict(layer.others), {}, StoredModel(recipe, layer.matrices)
    for matrices in layer.matrices:
        statistics = layer.statistics.get(matrices.names)
        peak = torch.stack([layer.weights[name].abs().max() for name, _ in matrices.tensors()]).max()
        for name, outputs in matrices.tensors():
            before, dtype, scheme = layer.weights[name], layer.dtypes[name], recipe.scheme_of(matrices, name)
            pruned = before if recipe.pruning is None else prune_by(recipe, before, statistics)
            if scheme.is_low_rank:
                factors = factorized(pruned, rank_of(outputs, matrices.inputs, scheme.kept_share), statistics)
                parts = {"weight_left": factors.left.to(dtype), "weight_right": factors.right.to(dtype)}
            elif scheme.block_type:
                parts = {"weight": quantise(scheme.block_type, pruned, _importances(recipe, statistics))}
            elif scheme.grid is None:
                parts = {"weight": pruned.to(dtype)}
            else:
                rounded = _round(name, pruned, scheme, recipe, statistics, peak, stored.scale_dtype(dtype))
                parts = stored.encode(rounded, dtype, _input_scale(name, scheme, statistics))
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            errors[name] = _relative_error(stored.dense(tensors, name, outputs, matrices.inputs), before, statistics)
    return CompressedLayer(tensors, errors)


def meant_weights(layer: LayerWeights, tensors: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """What a compressed layer's tensors stand for, under the names of a plain checkpoint."""
    meant, stored = {name: tensors[name] for name in layer.others}, StoredModel(recipe, layer.matrices)
    for matrices in layer.matrices:
        for name, outputs in matrices.tensors():
            meant[name + ".weight"] = stored.dense(tensors, name, outputs, matrices.inputs)
    return meant


def prune_by(recipe: Recipe, weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    """With the recipe's zeros."""
    assert recipe.pruning is not None
    return prune(weight, recipe.pruning.method, recipe.pruning.pattern, statistics)


def _round(
    name: str,
    weight: Tensor,
    scheme: Scheme,
    recipe: Recipe,
    statistics: InputStatistics | None,
    peak: Tensor,
    dtype: torch.dtype,
) -> RoundedMatrix:
    assert scheme.grid is not None
    if statistics is None or not statistics.num_rows:  # an expert that no calibration token chose
        return round_to_nearest(weight, scheme.grid, peak, dtype)
    if recipe.smoothing == "awq" and not name.endswith(("q_proj", "k_proj")):  # errors of these meet in a softmax
        weight = clip_to_best_range(weight, statistics, scheme.grid, dtype)
    if recipe.rounding == "gptq":
        assert statistics.hessian is not None
        return gptq(weight, statistics.hessian, scheme.grid, peak, dtype, recipe.gptq)
    return round_to_nearest(weight, scheme.grid, peak, dtype)


def _importances(recipe: Recipe, statistics: InputStatistics | None) -> Tensor | None:
    has_seen_any = statistics is not None and statistics.num_rows > 0
    return statistics.mean_square if recipe.has_importances and statistics is not None and has_seen_any else None


def _smooth(model: ModelConfig, layer: LayerWeights, recipe: Recipe, fold: Fold) -> None:
    """Divide what the producer makes by factors, and multiply the consumers' columns by them."""
    matrices = fold.consumer
    statistics, scheme = layer.statistics[matrices.names], recipe.scheme_of(matrices)
    if scheme.grid is None or not statistics.num_rows:
        return
    names = [name for name, _ in matrices.tensors()]
    scale_dtype = StoredModel(recipe, [matrices]).scale_dtype(layer.dtypes[names[0]])
    consumers = Consumers([layer.weights[name] for name in names], statistics, scheme, scale_dtype)
    find = awq_factors if recipe.smoothing == "awq" else smoothquant_factors
    factors = fold_into(model, fold, layer.weights, layer.others, find(consumers))
    for name in names:
        layer.weights[name] = layer.weights[name] * factors
    layer.statistics[matrices.names] = statistics.scaled(1 / factors)


def _input_scale(name: str, scheme: Scheme, statistics: InputStatistics | None) -> Tensor | None:
    if scheme.activations is None or scheme.activations.scale_per != "tensor":
        return None
    if statistics is None or not statistics.num_rows:
        raise CompressError(
            f"{name}: its inputs have no scale, since no calibration token came there; give more --blocks"
        )
    return scheme.activations.scale_of(statistics.peak)


def _relative_error(after: Tensor, before: Tensor, statistics: InputStatistics | None) -> float:
    if statistics is None or not statistics.num_rows:
        return float((after - before).square().sum() / before.square().sum().clamp(min=1e-30))
    return statistics.output_error(after - before) / max(statistics.output_error(before), 1e-30)
