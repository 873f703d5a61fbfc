"""BitNet b1.58 (arXiv:2402.17764): weights of -1, 0 and 1, inputs in 8 bits.

The architectures that have it come with their families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.quant.integers import positive_scalar
from workers.model.quant.modules import DecoderMatrices
from workers.model.quant.options import Options
from workers.model.quant.storage import Cut, StoredFormat
from workers.model.weight_format import QuantMethod

if TYPE_CHECKING:
    from workers.model.loader import Weights
    from workers.model.quant.weights import QuantWeight

_PER_BYTE = 4
_KEYS = (
    "quant_method",
    "linear_class",
    "quantization_mode",
    "modules_to_not_convert",
    "use_rms_norm",
    "rms_norm_eps",
)


@dataclass(frozen=True, slots=True)
class TernaryStorage:
    """NAME.weight uint8 [outputs / 4, inputs]: bits 2 i of row r are output r + i * outputs / 4, plus one.
    NAME.weight_scale [1] divides the product, or multiplies it."""

    divides: bool

    edges: tuple[int, int] = (1, 1)

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        if outputs % _PER_BYTE:
            raise ModelError(f"{name}: its {outputs} outputs do not fill bytes of {_PER_BYTE}")
        return {
            f"{name}.weight": WantedTensor((outputs // _PER_BYTE, inputs), ("U8",)),
            f"{name}.weight_scale": WantedTensor((1,), other_shapes=((),)),
        }

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        import torch

        from workers.model.quant.weights import Int8Weight

        shape = (cut.outputs // _PER_BYTE, cut.inputs)
        packed = weights.read(f"{cut.name}.weight", shape, (slice(None), cut.columns), as_stored=True)
        codes = torch.cat([packed >> shift & 3 for shift in range(0, 8, 2)])[cut.rows].to(torch.int8) - 1
        if bool((codes == 2).any()):
            raise ModelError(f"{cut.name}.weight holds a code that is none of -1, 0 and 1")
        scale = positive_scalar(weights, f"{cut.name}.weight_scale")
        scales = torch.full((len(codes),), 1.0 / scale if self.divides else scale, device=codes.device)
        return Int8Weight(codes, scales)


def read(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """From quantization_config. Raises ModelError."""
    options = Options(quantization, where)
    options.known(*_KEYS)
    options.one_of("quantization_mode", ("offline",), "offline")
    options.one_of("use_rms_norm", (False,), False)
    kind = options.one_of("linear_class", ("bitlinear", "autobitlinear"), "bitlinear")
    storage = TernaryStorage(divides=kind == "bitlinear")
    return StoredFormat(DecoderMatrices(storage, options.texts("modules_to_not_convert")))


QUANT_METHODS = (QuantMethod("bitnet", read),)
