"""What a layer asks of a checkpoint's matrices, and what a weight format answers. Without torch.

A format is one file: which tensors stand in place of a matrix, how they are cut for tensor-parallel ranks, and what
multiplies by them. It is found by config.json's quantization_config. Knows nothing of any particular format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from checkpoint.tensors import WantedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantise import Scheme
    from workers.model.arithmetic import Arithmetic
    from workers.model.loader import Weights
    from workers.parallel import Shard

Part = tuple[slice, ...]  # of a tensor's leading dimensions; () is all of it


class Split(Enum):
    """How a matrix [outputs, inputs] is cut for tensor-parallel ranks."""

    NONE = "whole on every rank"
    OUTPUTS = "each rank has its share of the outputs (column-parallel)"
    INPUTS = "each rank has its share of the inputs (row-parallel); the layer adds the partial results up"


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's share of one matrix."""

    name: str
    num_rows: int  # outputs of the whole tensor
    part: Part  # of a tensor [outputs, inputs]; its first slice, if any, is that of a tensor [outputs]


@dataclass(frozen=True, slots=True)
class Matrices:
    """Matrices [outputs, inputs] that are multiplied by the same rows, in one product where the format allows it."""

    names: tuple[str, ...]
    """In the checkpoint, without the last part: model.layers.0.self_attn.q_proj. One for each matrix; or a single one,
    whose tensor has them all, one below the other."""
    outputs: tuple[int, ...]  # of each
    inputs: int
    split: Split = Split.NONE
    has_bias: bool = False  # NAME.bias [outputs] beside each

    def tensors(self) -> list[tuple[str, int]]:
        """Name and outputs of each tensor of the checkpoint."""
        sizes = (sum(self.outputs),) if len(self.names) == 1 else self.outputs
        return list(zip(self.names, sizes, strict=True))

    def pieces(self, shard: Shard) -> list[Piece]:
        """The rank's share of each matrix."""
        inputs = (shard.slice_of(self.inputs),) if self.split is Split.INPUTS else ()
        tensors, pieces, above = self.tensors(), [], 0
        for index, size in enumerate(self.outputs):
            name, num_rows = tensors[index if len(tensors) > 1 else 0]
            first = above if num_rows != size else 0
            above += size
            mine = shard.slice_of(size) if self.split is Split.OUTPUTS else slice(0, size)
            rows = slice(first + mine.start, first + mine.stop)
            pieces.append(Piece(name, num_rows, (rows, *inputs)))
        return pieces


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """Gated MLPs of equal sizes, among which each token has its own; each rank has its share of every width."""

    gates: tuple[str, ...]  # names of [width, hidden], one per expert
    ups: tuple[str, ...]
    downs: tuple[str, ...]  # names of [hidden, width]
    hidden: int
    width: int

    def as_matrices(self) -> list[Matrices]:
        """Each expert's, by itself."""
        found = []
        for gate, up, down in zip(self.gates, self.ups, self.downs, strict=True):
            found.append(Matrices((gate, up), (self.width, self.width), self.hidden, Split.OUTPUTS))
            found.append(Matrices((down,), (self.hidden,), self.width, Split.INPUTS))
        return found


@dataclass(frozen=True, slots=True)
class Quantised:
    """Rows in 8 bits, as a norm or an activation leaves them for a product with an input_scheme."""

    values: Tensor  # [tokens, width], int8 or float8_e4m3fn
    scales: Tensor  # fp32 [tokens, 1], or [tokens, groups of 128]
    scheme: Scheme


class Linear(Protocol):
    """y = x W^T (+ bias) of one or several matrices, on one rank."""

    @property
    def input_scheme(self) -> Scheme | None:
        """What x should come quantised by, where the layer before can; None: as it is."""

    @property
    def output_sizes(self) -> list[int]:
        """Columns of the result that belong to each matrix."""

    @property
    def kind(self) -> str:
        """What multiplies by what, for the log: W4A16 g64."""

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """[tokens, inputs] -> [tokens, sum of output_sizes]. Takes plain rows whatever input_scheme says."""


class Experts(Protocol):
    """The chosen experts' outputs, weighted and added, on one rank."""

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden], expert_ids int32 and weights fp32 [tokens, top_k] -> [tokens, hidden], not yet added up
        over the ranks."""


class WeightFormat(Protocol):
    """How a checkpoint stores its matrices. A frozen dataclass: its fields are part of what the model is.

    `linear` and `experts` run on a rank and may import torch; they raise ModelError for what the format cannot do, such
    as `arithmetic.batch_invariant`. Everything else is asked before anything starts.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """What stands in the checkpoint for the matrix of this name."""

    def check_split(self, matrices: Matrices, tp: int) -> None:
        """Raise ModelError, naming a matrix, unless these can be cut for so many ranks."""

    def linear(self, matrices: Matrices, weights: Weights, arithmetic: Arithmetic, bias: Tensor | None) -> Linear:
        """The rank's share. bias: the rank's, [sum of its outputs]."""

    def experts(self, experts: ExpertMatrices, weights: Weights, arithmetic: Arithmetic) -> Experts:
        """The rank's share."""

    def table_tensors(self, name: str, shape: tuple[int, int]) -> Mapping[str, WantedTensor]:
        """What stands in the checkpoint for a matrix over the vocabulary: the embedding, or the head."""

    def table(self, name: str, shape: tuple[int, int], rows: slice, weights: Weights) -> Tensor:
        """Some rows of such a matrix, in the dtype that is computed in."""


@dataclass(frozen=True, slots=True)
class QuantMethod:
    """A weight format by its quant_method in config.json."""

    name: str
    read: Callable[[Mapping[str, Any], str], WeightFormat] = field(repr=False)
    """From quantization_config, and what an error begins with. Raises ModelError for what it does not understand."""
