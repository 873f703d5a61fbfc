"""Matrices that are stored as floats of 8 or 4 bits.

The names of the tensors are those of compressed-tensors, but for the scales of 8-bit floats, which differ by writer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.quant.integers import InputRounding, input_change, num_groups, positive_scalar, row_scales
from workers.model.quant.storage import Cut

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantise import Scheme
    from workers.model.loader import Weights
    from workers.model.quant.weights import QuantWeight

BLOCK = 128
_FLOATS_AND_E8M0 = ("F64", "F32", "F16", "BF16", "F8_E8M0")

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 16 codes of a 4-bit float stand for."""


@dataclass(frozen=True, slots=True)
class Fp8Storage:
    """NAME.weight e4m3 [outputs, inputs], and its scales, which multiply: one, one per output, or one per block of
    128x128. For fixed scales of the inputs NAME.input_scale.

    A rank's share that begins within a block is dequantized: its blocks would not be those of a product.
    """

    scale_name: str
    has_blocks: bool = False
    input_rounding: InputRounding = "row"
    has_multiplier: bool = False
    """NAME.pre_quant_scale [inputs] may be there: the inputs are multiplied by it (SmoothQuant)."""

    edges: tuple[int, int] = (1, 1)

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        if self.has_blocks:
            scales = WantedTensor((-(-outputs // BLOCK), -(-inputs // BLOCK)), _FLOATS_AND_E8M0)
        else:
            scales = WantedTensor((outputs, 1), other_shapes=((outputs,), (1,), (), (1, 1)))
        wanted = {f"{name}.weight": WantedTensor((outputs, inputs), ("F8_E4M3",)), f"{name}.{self.scale_name}": scales}
        is_fixed = self.input_rounding == "fixed"
        # Writers leave a scale that is not used.
        wanted[f"{name}.input_scale"] = WantedTensor((1,), other_shapes=((),), is_optional=not is_fixed)
        if self.has_multiplier:
            wanted[f"{name}.pre_quant_scale"] = WantedTensor((inputs,), is_optional=True)
        return wanted

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.weights import DenseWeight, Fp8Weight, StaticScale

        name = cut.name
        values = weights.read(f"{name}.weight", (cut.outputs, cut.inputs), (cut.rows, cut.columns), as_stored=True)
        fixed = None
        if self.input_rounding == "fixed":
            fixed = StaticScale(positive_scalar(weights, f"{name}.input_scale"))
        scale_name = f"{name}.{self.scale_name}"
        if self.has_blocks:
            part = tuple(slice(side.start // BLOCK, -(-side.stop // BLOCK)) for side in (cut.rows, cut.columns))
            shape = (-(-cut.outputs // BLOCK), -(-cut.inputs // BLOCK))
            scales = weights.read(scale_name, shape, part, as_stored=True).float()
        else:
            scales = row_scales(weights, scale_name, cut)
        begins_within = self.has_blocks and (cut.rows.start % BLOCK or cut.columns.start % BLOCK)
        if begins_within:
            return DenseWeight(values.float() * _per_number(scales, cut))
        scheme: Scheme | None = None if self.input_rounding == "none" else "fp8 groups" if self.has_blocks else "fp8"
        return Fp8Weight(values, scales, scheme, fixed, input_change(weights, cut))


def _per_number(scales: Tensor, cut: Cut) -> Tensor:
    """Scales of blocks -> [rows, columns] of the cut."""
    row, column = cut.rows.start % BLOCK, cut.columns.start % BLOCK
    wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[row:, column:]
    return wide[: cut.rows.stop - cut.rows.start, : cut.columns.stop - cut.columns.start]


@dataclass(frozen=True, slots=True)
class Fp4Storage:
    """NAME.weight_packed uint8 [outputs, inputs / 2], e2m1 floats, the first input low, and NAME.weight_scale: MXFP4's
    powers of two, uint8 per 32; or NVFP4's e4m3 per 16, which NAME.weight_global_scale [1] divides.

    Activations stay as they are, whatever the checkpoint rounds them to: that loses less.
    """

    group_size: int
    has_global_scale: bool

    @property
    def edges(self) -> tuple[int, int]:
        """As in MatrixStorage."""
        return 1, self.group_size

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        groups = num_groups(name, inputs, self.group_size)
        wanted = {
            f"{name}.weight_packed": WantedTensor((outputs, inputs // 2), ("U8",)),
            f"{name}.weight_scale": WantedTensor((outputs, groups), ("F8_E4M3",) if self.has_global_scale else ("U8",)),
        }
        if self.has_global_scale:
            wanted[f"{name}.weight_global_scale"] = WantedTensor((1,), other_shapes=((),))
            wanted[f"{name}.input_global_scale"] = WantedTensor((1,), other_shapes=((),), is_optional=True)
        return wanted

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.words import nibbles

        name = cut.name
        half = slice(cut.columns.start // 2, cut.columns.stop // 2)
        packed = weights.read(f"{name}.weight_packed", (cut.outputs, cut.inputs // 2), (cut.rows, half), as_stored=True)
        groups = slice(cut.columns.start // self.group_size, cut.columns.stop // self.group_size)
        shape = (cut.outputs, cut.inputs // self.group_size)
        stored = weights.read(f"{name}.weight_scale", shape, (cut.rows, groups), as_stored=True)
        if self.has_global_scale:
            scales = stored.float() / positive_scalar(weights, f"{name}.weight_global_scale")
        else:
            scales = powers_of_two(stored)
        return fp4_weight(nibbles(packed), scales)


def powers_of_two(exponents: Tensor) -> Tensor:
    """MX scales: uint8 e -> fp32 2 ** (e - 127). Raises ModelError for 255, which is not a number."""
    import torch

    if bool((exponents == 255).any()):
        raise ModelError("a scale of 4-bit floats is not a number")
    return torch.exp2(exponents.float() - 127.0)


def fp4_weight(codes: Tensor, scales: Tensor) -> QuantWeight:
    """Codes uint8 [outputs, inputs] of e2m1 floats, and scales fp32 [outputs, groups]."""
    import torch

    from workers.model.quant.weights import GroupedWeight

    return GroupedWeight(codes, scales, 4, table=torch.tensor(E2M1, device=codes.device))
