"""MXFP4 as gpt-oss stores its experts. The architecture comes with its family; this is the codec and its matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint.tensors import WantedTensor
from workers.model.quant.floats import fp4_weight, powers_of_two
from workers.model.quant.integers import num_groups
from workers.model.quant.modules import DecoderMatrices
from workers.model.quant.options import Options
from workers.model.quant.storage import Cut, StoredFormat
from workers.model.weight_format import QuantMethod

if TYPE_CHECKING:
    from workers.model.loader import Weights
    from workers.model.quant.weights import QuantWeight

_GROUP = 32
_KEYS = ("quant_method", "modules_to_not_convert", "dequantize")


@dataclass(frozen=True, slots=True)
class BlocksStorage:
    """NAME_blocks uint8 [outputs, inputs / 32, 16], e2m1 floats, the first of two low, and NAME_scales uint8 [outputs,
    inputs / 32], powers of two plus 127. A matrix of stacked experts is outputs = experts * rows."""

    edges: tuple[int, int] = (1, _GROUP)

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        groups = num_groups(name, inputs, _GROUP)
        return {
            f"{name}_blocks": WantedTensor((outputs, groups, _GROUP // 2), ("U8",)),
            f"{name}_scales": WantedTensor((outputs, groups), ("U8",)),
        }

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.words import nibbles

        groups = cut.inputs // _GROUP
        part = (cut.rows, slice(cut.columns.start // _GROUP, cut.columns.stop // _GROUP))
        blocks = weights.read(f"{cut.name}_blocks", (cut.outputs, groups, _GROUP // 2), part, as_stored=True)
        scales = weights.read(f"{cut.name}_scales", (cut.outputs, groups), part, as_stored=True)
        return fp4_weight(nibbles(blocks).flatten(1), powers_of_two(scales))


def read(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """From quantization_config. Raises ModelError."""
    options = Options(quantization, where)
    options.known(*_KEYS)
    return StoredFormat(DecoderMatrices(BlocksStorage(), options.texts("modules_to_not_convert")))


QUANT_METHODS = (QuantMethod("mxfp4", read),)
