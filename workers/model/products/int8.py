"""Integer products: rows are rounded to 8 bits, each by its own scale or all by a fixed one, and summed exactly.

On a CPU oneDNN multiplies unsigned rows by signed weights, with 128 added to each number of a row: what signed rows get
there is a plain loop (1/250 of the speed). Knows nothing of checkpoints' formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.quantise import Scheme
from workers.model.arithmetic import Arithmetic
from workers.model.products.dense import dequantized_linear
from workers.model.products.rounded_rows import RoundedRows
from workers.model.products.ternary import TernaryLinear, is_ternary
from workers.model.quant.weights import InputChange, Int8Weight, StaticScale
from workers.model.weight_format import Linear, Quantised

_KIND = "W8A8 int"
_CUDA_MULTIPLE = 16  # of inputs and outputs
_ROWS_AT_A_TIME = 32  # that are rounded: their numbers are still in the cache at the next operation
_SMALLEST = 1e-30  # largest magnitude of a row


def int8_linear(
    weight: Int8Weight, sizes: list[int], dtype: torch.dtype, arithmetic: Arithmetic, bias: Tensor | None
) -> Linear:
    """The fastest that the device has."""
    if arithmetic.groups.device.type == "cuda":
        has_kernel = not (arithmetic.batch_invariant or _zero(weight))
        if has_kernel and is_ternary(weight):
            return TernaryLinear.of(weight, sizes, dtype, bias)
        if has_kernel:
            return _CudaInt8Linear.of(weight, sizes, dtype, bias)
    elif torch.cpu._is_vnni_supported():
        return CpuInt8Linear.of(weight, sizes, dtype, bias)
    return dequantized_linear(weight, sizes, dtype, arithmetic, bias, _KIND)


def _zero(weight: Int8Weight) -> int:
    return weight.input_scale.zero if weight.input_scale is not None else 0


@dataclass(frozen=True, slots=True)
class CpuInt8Linear:
    """The product by oneDNN."""

    weight: Tensor  # in oneDNN's layout
    scales: Tensor  # fp32 [outputs]
    zeros: Tensor  # int32 [outputs]
    bias: Tensor | None
    dtype: torch.dtype
    output_sizes: list[int]
    input_scale: StaticScale | None
    inputs_change: InputChange
    outliers: _Outliers | None
    kind: str = _KIND
    input_scheme: None = None  # the layers before would round to signed numbers

    @classmethod
    def of(cls, weight: Int8Weight, sizes: list[int], dtype: torch.dtype, bias: Tensor | None) -> CpuInt8Linear:
        threshold = weight.outlier_threshold
        return cls(
            torch.ops.onednn.qlinear_prepack(weight.codes, None),
            weight.scales.float().contiguous(),
            torch.zeros(weight.num_outputs, dtype=torch.int32),
            None if bias is None else bias.float(),
            dtype,
            sizes,
            weight.input_scale,
            weight.inputs_change,
            _Outliers(threshold, weight.codes, weight.scales) if threshold else None,
            _KIND + (" with outliers" if threshold else ""),
        )

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        assert isinstance(x, Tensor), "input_scheme asks for none"
        x = self.inputs_change(x) if self.inputs_change else x
        static = self.input_scale
        if static is not None:
            codes = _copied(x).mul_(1.0 / static.scale).add_(128 + static.zero).round_().clamp_(0, 255).to(torch.uint8)
            return self._product(codes, static.scale, 128 + static.zero, self.bias, self.dtype)
        if self.outliers is None:
            return self._dynamic(x)
        few, rest = self.outliers.split(x)
        y = self._dynamic(rest)
        return y if few is None else y + self.outliers.product(few)

    def _dynamic(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # one code for any number of rows
            parts = [_round_rows(x)]
        elif len(x) == 1:
            wide = _copied(x)
            low, high = torch.aminmax(wide)
            scale = max(-low.item(), high.item(), _SMALLEST) / 127.0
            return self._product(_unsigned(wide.mul_(1.0 / scale), 128), scale, 128, self.bias, self.dtype)
        else:
            parts = [_round_rows(rows) for rows in x.split(_ROWS_AT_A_TIME)]
        codes, scales = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts, strict=True))
        y = self._product(codes, 1.0, 128, None, torch.float32).mul_(scales)
        return (y if self.bias is None else y.add_(self.bias)).to(self.dtype)

    def _product(self, codes: Tensor, scale: float, zero: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, scale, zero, self.weight, self.scales, self.zeros, bias, 1.0, 0, dtype, "none", [], ""
        )
        return y


def _copied(x: Tensor) -> Tensor:
    """In fp32, to be changed: the rows themselves are read again, by what is added to the product."""
    return x.to(torch.float32, copy=True)


def _round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, inputs] -> uint8, each number plus 128, and fp32 scales [rows, 1]."""
    wide = _copied(x)
    scales = wide.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST).mul_(1.0 / 127.0)
    return _unsigned(wide.div_(scales), 128), scales


def _unsigned(scaled: Tensor, zero: int) -> Tensor:
    """Changes what it is given."""
    return scaled.add_(zero).round_().to(torch.uint8)


@dataclass(frozen=True, slots=True)
class _Outliers:
    """Inputs that are too large to round with the others."""

    threshold: float
    codes: Tensor  # int8 [outputs, inputs]
    scales: Tensor

    def split(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """The outliers, with zeros between them, and the other inputs; None where there are none."""
        is_large = x.abs() >= self.threshold
        if not is_large.any():
            return None, x
        return x.where(is_large, 0.0), x.masked_fill(is_large, 0.0)

    def product(self, x: Tensor) -> Tensor:
        """That of a few columns; the others are zero."""
        columns = x.any(dim=0).nonzero().squeeze(-1)
        weight = (self.codes[:, columns].float() * self.scales.unsqueeze(-1)).to(x.dtype)
        return F.linear(x[:, columns], weight)


@dataclass(frozen=True, slots=True)
class _CudaInt8Linear:
    weight: Tensor  # int8 [outputs, inputs], both rounded up to multiples of 16
    scales: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    output_sizes: list[int]
    rows: RoundedRows
    outlier_threshold: float
    kind: str

    @classmethod
    def of(cls, weight: Int8Weight, sizes: list[int], dtype: torch.dtype, bias: Tensor | None) -> _CudaInt8Linear:
        rows, columns = (-size % _CUDA_MULTIPLE for size in weight.codes.shape)
        padded, scales = F.pad(weight.codes, (0, columns, 0, rows)).contiguous(), F.pad(weight.scales, (0, rows))
        threshold = weight.outlier_threshold
        kind = _KIND + (" with outliers" if threshold else "")
        rows_of_x = RoundedRows("int8", weight.inputs_change, columns, weight.input_scale)
        return cls(padded, scales, bias, dtype, sizes, rows_of_x, threshold, kind)

    @property
    def input_scheme(self) -> Scheme | None:
        """As in Linear."""
        return None if self.outlier_threshold else self.rows.input_scheme

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        if self.outlier_threshold:
            assert isinstance(x, Tensor), "input_scheme asks for none"
            y = self._with_outliers(self.rows.inputs_change(x))
        else:
            values, scales = self.rows(x)
            y = kernels.int8_gemm(values, self.weight, scales.squeeze(-1), self.scales)
        y = y[:, : sum(self.output_sizes)].to(self.dtype)
        return y if self.bias is None else y + self.bias

    def _with_outliers(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, self.rows.num_added_inputs))
        values, scales, flags = kernels.split_outliers(x, self.outlier_threshold)
        rest = kernels.int8_gemm(values, self.weight, scales.squeeze(-1), self.scales)
        return kernels.add_outliers(rest, x, flags, self.weight, self.scales, self.outlier_threshold)
