"""Compresses a model one layer at a time, and measures what it loses on the way.

Calibration blocks reach each layer through the layers before it as they were compressed. Held-out blocks go through
both models. A run that was cut off reads the finished layers, sends the blocks through them, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint.tensors import StoredTensor
from compress.calibration.blocks import TokenBlocks
from compress.calibration.statistics import LayerRecorder
from compress.calibration.tapped import Replaced, Tap, TappedFormat
from compress.calibration.walk import ModelWalk
from compress.errors import CompressError
from compress.gguf.blocks.quantise import quantise
from compress.kv_channels import ChannelRecorder, packed_cache
from compress.kv_scales import CacheRecorder, rounded_cache
from compress.layer import CompressedLayer, LayerWeights, compress_layer, meant_weights, read_layer
from compress.loss import Loss, compare
from compress.partial import PartialCheckpoint
from compress.recipe import Recipe
from compress.stored import StoredModel
from workers.model.tensor_layout import EMBEDDING, HEAD, TensorLayout
from workers.model.weight_format import Matrices


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run knows beside its files."""

    errors: dict[str, float]  # see CompressedLayer
    loss: Loss | None  # None without held-out blocks
    schemes: dict[str, str]  # of each matrix, by name


@dataclass(slots=True)
class _Streams:
    """Hidden states before the next layer."""

    calibration: Tensor
    plain: Tensor
    compressed: Tensor


class LayerwiseRun:
    """One compression."""

    def __init__(self, walk: ModelWalk, recipe: Recipe, blocks: TokenBlocks, partial: PartialCheckpoint) -> None:
        self._walk, self._recipe, self._blocks, self._partial = walk, recipe, blocks, partial
        self._errors: dict[str, float] = {}
        self._schemes: dict[str, str] = {}

    @torch.no_grad()
    def run(self, stored: dict[str, StoredTensor], on_layer: Callable[[int], None]) -> Outcome:
        """stored: all tensors of the checkpoint. on_layer: called with the number of layers that are done."""
        walk, num_layers = self._walk, self._walk.model.num_hidden_layers
        for index in range(num_layers):
            check_layer(walk, self._recipe, index)
        self._write_ends(stored)
        ends = self._compressed_ends()
        held_out = self._blocks.held_out
        plain = walk.enter(held_out)
        streams = _Streams(ends.enter(self._blocks.calibration), plain, plain if ends is walk else ends.enter(held_out))
        for index in range(num_layers):
            self._layer(index, streams)
            on_layer(index + 1)
        loss = compare(walk, held_out, streams.plain, streams.compressed, ends) if len(held_out) else None
        return Outcome(self._errors, loss, self._schemes)

    def _layer(self, index: int, streams: _Streams) -> None:
        layer = read_layer(self._walk.model, self._walk.weights, index)
        if self._partial.has(index + 1):
            tensors, notes = self._partial.read(index + 1)
            errors = notes["errors"]
        else:
            made = self._compress(layer, index, streams.calibration)
            tensors, errors = made.tensors, made.errors
            self._partial.write(index + 1, tensors, {"errors": errors})
        self._errors |= errors
        for matrices in layer.matrices:
            self._schemes |= {name: self._recipe.scheme_of(matrices, name).label for name in matrices.names}
        self._send_on(index, layer, tensors, streams)

    def _compress(self, layer: LayerWeights, index: int, x: Tensor) -> CompressedLayer:
        recipe, walk = self._recipe, self._walk
        spec = walk.model.cache_specs[index]
        cache = CacheRecorder(spec) if recipe.has_kv_scales else None
        channels = ChannelRecorder(spec, x.shape[1]) if recipe.has_kv_channels else None
        if recipe.needs_calibration:
            recorder = LayerRecorder(recipe.needs_hessian, walk.device)

            def tap(kv: Tensor) -> None:
                for each in (cache, channels):
                    if each is not None:
                        each.tap(kv)

            query_tap = None if channels is None else channels.tap_queries
            walk.through(walk.layer(index, TappedFormat(recorder.tap)), index, x, tap, query_tap)
            layer.statistics = {matrices.names: recorder.of(matrices) for matrices in layer.matrices}
        made = compress_layer(walk.model, layer, recipe, index)
        for each in (cache, channels):
            if each is not None:
                made.tensors.update(each.tensors(f"model.layers.{index}.self_attn."))
        return made

    def _send_on(self, index: int, layer: LayerWeights, tensors: dict[str, Tensor], streams: _Streams) -> None:
        walk, is_last = self._walk, index + 1 == self._walk.model.num_hidden_layers
        given = meant_weights(layer, tensors, self._recipe)
        compressed = walk.layer(
            index, TappedFormat(input_rounding(self._recipe, tensors)), Replaced(walk.weights, given)
        )
        prefix = f"model.layers.{index}.self_attn."
        cache_tap = rounded_cache(tensors, prefix) or packed_cache(tensors, prefix)
        if self._recipe.needs_calibration and not is_last:
            streams.calibration = walk.through(compressed, index, streams.calibration, cache_tap)
        if len(streams.plain):
            streams.compressed = walk.through(compressed, index, streams.compressed, cache_tap)
            streams.plain = walk.through(walk.plain_layer(index), index, streams.plain)

    def _write_ends(self, stored: dict[str, StoredTensor]) -> None:
        """File 0: embedding, final norm, head; as they are, but in a GGUF."""
        if self._partial.has(0):
            return
        of_layers: set[str] = set()
        for index in range(self._walk.model.num_hidden_layers):
            layout = TensorLayout(self._walk.model.weight_format)
            self._walk.model.decoder.add_tensors(layout, self._walk.model.hidden_size, index)
            of_layers |= layout.wanted.keys()
        ends = {
            name: self._walk.weights.read(name, tensor.shape, as_stored=True)
            for name, tensor in stored.items()
            if name not in of_layers
        }
        for name, tensor in ends.items():
            scheme = self._recipe.scheme_of_table(name.removesuffix(".weight"))
            if scheme.block_type:
                ends[name] = quantise(scheme.block_type, tensor.float())
        self._partial.write(0, ends, {})

    def _compressed_ends(self) -> ModelWalk:
        """A walk whose embedding and head are those of file 0."""
        model = self._walk.model
        names = (EMBEDDING,) if model.tie_word_embeddings else (EMBEDDING, HEAD)
        changed = [name for name in names if not self._recipe.scheme_of_table(name).is_plain]
        if not changed:
            return self._walk
        tensors, _ = self._partial.read(0)
        tables = [Matrices((name,), (model.vocab_size,), model.hidden_size) for name in changed]
        stored = StoredModel(self._recipe, tables)
        given = {f"{name}.weight": stored.dense(tensors, name, model.vocab_size, model.hidden_size) for name in changed}
        return ModelWalk(model, Replaced(self._walk.weights, given), self._walk.device)


def check_layer(walk: ModelWalk, recipe: Recipe, index: int) -> None:
    """Raise CompressError for what cannot be compressed so, before anything is computed."""
    layout = TensorLayout(walk.model.weight_format)
    walk.model.decoder.add_tensors(layout, walk.model.hidden_size, index)
    for matrices in layout.matrices:
        recipe.check(matrices)
    if (recipe.has_kv_scales or recipe.has_kv_channels) and walk.model.cache_specs[index].is_latent:
        raise CompressError(f"layer {index}: scales of a latent cache are not known")


def input_rounding(recipe: Recipe, tensors: dict[str, Tensor]) -> Tap:
    """What a server does to each product's inputs. tensors: of the compressed layer."""

    def tap(matrices: Matrices, x: Tensor) -> Tensor:
        rounding = recipe.scheme_of(matrices).activations
        if rounding is None:
            return x
        scale = tensors.get(matrices.names[0] + ".input_scale")
        return rounding.round(x, None if scale is None else scale.float())

    return tap
