"""What is remembered of the inputs of a product while calibration blocks run. Knows nothing of methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.model.weight_format import Matrices

_ROWS_KEPT_PER_CALL = 64


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Of rows [tokens, inputs] that went into one product."""

    num_rows: int
    hessian: Tensor | None  # fp32 [inputs, inputs]: the mean of x^T x; None where it was not asked for
    peak: Tensor  # fp32 [inputs]: largest magnitude of each column
    mean_magnitude: Tensor  # fp32 [inputs]
    mean_square: Tensor  # fp32 [inputs]
    rows: Tensor  # fp32 [some, inputs]: a sample

    def scaled(self, factors: Tensor) -> InputStatistics:
        """Those of x * factors."""
        hessian = None if self.hessian is None else self.hessian * factors[:, None] * factors
        return InputStatistics(
            self.num_rows,
            hessian,
            self.peak * factors,
            self.mean_magnitude * factors,
            self.mean_square * factors**2,
            self.rows * factors,
        )

    def output_error(self, change: Tensor) -> float:
        """Mean square of x @ change^T, summed over the outputs. change: fp32 [outputs, inputs]."""
        if self.hessian is not None:
            return float(((change @ self.hessian) * change).sum())
        return float((self.rows @ change.T).square().sum() / max(1, len(self.rows)))


class InputRecorder:
    """Adds up the statistics of one product's inputs."""

    def __init__(self, inputs: int, has_hessian: bool, device: torch.device) -> None:
        self._hessian = torch.zeros(inputs, inputs, device=device) if has_hessian else None
        self._peak, self._magnitude, self._square = (torch.zeros(inputs, device=device) for _ in range(3))
        self._rows: list[Tensor] = []
        self._num_rows = 0

    def add(self, x: Tensor) -> None:
        """Rows [tokens, inputs]."""
        x = x.float()
        self._num_rows += len(x)
        if self._hessian is not None:
            self._hessian.addmm_(x.T, x)
        magnitude = x.abs()
        self._peak = torch.maximum(self._peak, magnitude.amax(0))
        self._magnitude += magnitude.sum(0)
        self._square += x.square().sum(0)
        self._rows.append(x[:: max(1, len(x) // _ROWS_KEPT_PER_CALL)].clone())

    def result(self) -> InputStatistics:
        """All that was added."""
        count = max(1, self._num_rows)
        hessian = None if self._hessian is None else self._hessian / count
        rows = torch.cat(self._rows) if self._rows else self._peak.new_zeros(0, len(self._peak))
        return InputStatistics(self._num_rows, hessian, self._peak, self._magnitude / count, self._square / count, rows)


class LayerRecorder:
    """The statistics of all products of a layer; `tap` is for a TappedFormat."""

    def __init__(self, has_hessian: bool, device: torch.device) -> None:
        self._has_hessian, self._device = has_hessian, device
        self._recorders: dict[tuple[str, ...], InputRecorder] = {}

    def tap(self, matrices: Matrices, x: Tensor) -> Tensor:
        """Records and leaves the rows."""
        self._recorder(matrices).add(x)
        return x

    def of(self, matrices: Matrices) -> InputStatistics:
        """Those of one product; of an expert that no token chose they are zeros."""
        return self._recorder(matrices).result()

    def _recorder(self, matrices: Matrices) -> InputRecorder:
        if matrices.names not in self._recorders:
            self._recorders[matrices.names] = InputRecorder(matrices.inputs, self._has_hessian, self._device)
        return self._recorders[matrices.names]
