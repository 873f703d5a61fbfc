"""Runs a stage on a CPU with what lies between two attentions compiled: one call instead of dozens of operations.

The same steps as Stage.forward, by the layers' own code, traced. Embedding, attention and head stay as they are. Layers
of one kind share a library, and a library is made once for a processor; see library. Knows nothing of requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.config import EngineConfig
from workers.kv.schemes.paged_layer import PagedLayer
from workers.model.arithmetic import Arithmetic, PackedProduct
from workers.model.batch import Batch, GroupInputs
from workers.model.layers.attention import Attention
from workers.model.layers.decoder import PreNormLayer
from workers.model.layers.layer_cache import AttentionTerms, LayerCache
from workers.model.layers.linear import SummedLinear
from workers.model.layers.mlp import SwiGlu
from workers.model.layers.norm import HeadNorm, RmsNorm
from workers.model.products.dense import DenseLinear
from workers.model.products.grouped import GroupedLinear, Int4Product
from workers.model.products.int8 import CpuInt8Linear
from workers.model.quant.weights import InputChange
from workers.model.stage import Stage
from workers.runtime.compiled.choice import wants_compiled
from workers.runtime.compiled.held import NotDescribed, describe, in_place_of
from workers.runtime.compiled.library import NotCompiled, Traced, compiled

log = logging.getLogger(__name__)

_TRACED_ROWS = 6

_KNOWN = (
    PreNormLayer,
    Attention,
    AttentionTerms,
    RmsNorm,
    HeadNorm,
    SwiGlu,
    SummedLinear,
    DenseLinear,
    GroupedLinear,
    Int4Product,
    CpuInt8Linear,
    PackedProduct,
    InputChange,
)
_ROW_DEPENDENT = {Int4Product}  # other code for one row

_Code = Callable[..., tuple[Tensor, ...]]
_Piece = Callable[..., Sequence[Tensor]]


def compiled_stage(
    config: EngineConfig, stage: Stage, kv_caches: Sequence[LayerCache], num_groups: int
) -> CompiledStage | None:
    """The stage's, where the config asks for one and it can be had; on a CPU. num_groups: of the cache."""
    if stage.device.type != "cpu" or not wants_compiled(config, stage.hidden_size):
        return None
    try:
        return CompiledStage(stage, kv_caches, num_groups)
    except NotCompiled as error:
        log.warning("steps run without compiled layers: %s", error)
        return None


class CompiledStage:
    """A stage whose every token is written to the cache. Raises NotCompiled for layers that cannot be compiled."""

    def __init__(self, stage: Stage, kv_caches: Sequence[LayerCache], num_groups: int) -> None:
        self._stage, self._kv_caches, self._num_groups = stage, kv_caches, num_groups
        for cache in kv_caches:
            if not isinstance(cache, PagedLayer) or cache.is_quantised:
                raise NotCompiled("keys and values are not cached as they are computed")
        num_layers = len(stage.layers)
        # A piece goes from one attention to the next, but where a drafter wants the hidden states between two layers.
        wanted = {i for i in range(1, num_layers) if stage.layer_range[i] in stage.feature_layers}
        self._before = {i: self._before_piece(i) for i in {0} | wanted}
        self._between = {i: self._between_piece(i) for i in range(1, num_layers) if i not in wanted}
        self._after = {i: self._after_piece(i) for i in {num_layers - 1} | {i - 1 for i in wanted}}

    def forward(self, batch: Batch, received: Tensor | None, features: list[Tensor]) -> Tensor:
        """As Stage.forward."""
        stage, layers = self._stage, self._stage.layers
        where = (batch.positions, *(group.slot_mapping for group in batch.groups))
        hidden, residual = stage.enter(batch, received)
        features += stage.features(stage.layer_range.start, hidden, residual)
        q, residual = self._enter_layer(0, hidden, residual, where)
        for index, kv_cache in enumerate(self._kv_caches):
            attended = layers[index].attention(q, batch, kv_cache).contiguous()  # as it was when it was traced
            stage.on_layer()
            between = self._between.get(index + 1)
            if between is not None:
                q, residual = between(attended, residual, *where)
                continue
            hidden, residual = self._after[index](attended, residual)
            features += stage.features(stage.layer_range.start + index + 1, hidden, residual)
            if index + 1 < len(layers):
                q, residual = self._enter_layer(index + 1, hidden, residual, where)
        return stage.leave(hidden, residual, batch)

    def _enter_layer(
        self, index: int, hidden: Tensor, residual: Tensor | None, where: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            (q,) = self._before[index](hidden, *where)
            return q, hidden
        q, residual = self._before[index](hidden, residual, *where)
        return q, residual

    # ------------------------------------------------------------------------------------------------------ the pieces
    def _before_piece(self, index: int) -> _Piece:
        """(hidden, residual, positions, slots) -> q and residual; the model's first layer without a residual stream."""
        layer, kv_cache = self._stage.layers[index], self._kv_caches[index]

        def first(hidden: Tensor, *where: Tensor) -> tuple[Tensor, ...]:
            return layer.before_attention(hidden, None, _batch(*where), kv_cache)[:1]

        def later(hidden: Tensor, residual: Tensor, *where: Tensor) -> tuple[Tensor, ...]:
            return layer.before_attention(hidden, residual, _batch(*where), kv_cache)

        widths = [self._stage.hidden_size]
        if index == 0 and self._stage.is_first:
            return self._compiled(first, widths, [layer], kv_cache)
        return self._compiled(later, widths * 2, [layer], kv_cache)

    def _between_piece(self, index: int) -> _Piece:
        """(attended, residual, positions, slots) -> q and residual, of the next layer."""
        before, layer = self._stage.layers[index - 1 : index + 1]
        kv_cache = self._kv_caches[index]

        def between(attended: Tensor, residual: Tensor, *where: Tensor) -> tuple[Tensor, ...]:
            hidden, residual = before.after_attention(attended, residual)
            return layer.before_attention(hidden, residual, _batch(*where), kv_cache)

        widths = [before.attended_width, self._stage.hidden_size]
        return self._compiled(between, widths, [before, layer], kv_cache, is_frequent=True)

    def _after_piece(self, index: int) -> _Piece:
        """(attended, residual) -> hidden and residual."""
        layer = self._stage.layers[index]
        widths = [layer.attended_width, self._stage.hidden_size]
        return self._compiled(layer.after_attention, widths, [layer], None)

    def _compiled(
        self,
        code: _Code,
        widths: Sequence[int],
        layers: Sequence[Any],
        kv_cache: LayerCache | None,
        is_frequent: bool = False,
    ) -> _Piece:
        """widths: of the rows that it takes; with a cache also positions and slots.

        is_frequent: it runs for most layers of a step. Only such a piece gets a library of its own for one row.
        """
        objects = layers if kv_cache is None else (*layers, kv_cache)
        try:
            described = describe(objects, _KNOWN, opaque=(Arithmetic,), dynamic=(PagedLayer,))
        except NotDescribed as error:
            raise NotCompiled(str(error)) from error
        held = described.tensors
        num_longs = 0 if kv_cache is None else 1 + self._num_groups
        num_with_rows = len(widths) + num_longs

        def on_arguments(*arguments: Tensor) -> tuple[Tensor, ...]:
            with in_place_of(held, arguments[num_with_rows:]):
                return code(*arguments[:num_with_rows])

        def trace(num_rows: int) -> Traced:
            rows = [torch.zeros(num_rows, width, dtype=self._stage.dtype) for width in widths]
            rows += [torch.arange(num_rows) for _ in range(num_longs)]
            # Packed weights have no strides; as arguments they stand for themselves.
            stand_ins = [
                torch.empty(each.tensor.shape, dtype=each.tensor.dtype)
                if each.tensor.is_mkldnn
                else torch.empty_strided(each.tensor.shape, each.tensor.stride(), dtype=each.tensor.dtype)
                for each in held
            ]
            is_dynamic = [each.is_dynamic for each in held]
            return Traced(on_arguments, [*rows, *stand_ins], num_with_rows, num_rows == 1, is_dynamic)

        name = f"{getattr(code, '__name__', '')} {widths} {self._num_groups} {self._stage.dtype}"
        weights = [each.tensor for each in held]
        run = compiled((name, *described.rest), lambda: trace(_TRACED_ROWS))
        if not described.types & _ROW_DEPENDENT:
            return lambda *rows: run([*rows, *weights])
        if not is_frequent:
            return lambda *rows: code(*rows) if len(rows[0]) == 1 else run([*rows, *weights])
        run_one = compiled((f"{name} of one row", *described.rest), lambda: trace(1))
        return lambda *rows: (run_one if len(rows[0]) == 1 else run)([*rows, *weights])


def _batch(positions: Tensor, *slots: Tensor) -> Batch:
    """What a layer sees of a batch outside of attention."""
    groups = tuple(GroupInputs(each, each) for each in slots)
    return Batch(positions, positions, groups, 0, positions, positions, 0, positions)
