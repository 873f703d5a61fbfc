"""Matrices as products of two thin ones, as `switchyard quantize` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.quant.options import Options
from workers.model.quant.plain import PLAIN
from workers.model.quant.storage import Cut, MatrixStorage, StoredFormat
from workers.model.weight_format import QuantMethod

if TYPE_CHECKING:
    from workers.model.loader import Weights
    from workers.model.quant.weights import QuantWeight


@dataclass(frozen=True, slots=True)
class LowRankStorage:
    """NAME.weight_left [outputs, rank] and NAME.weight_right [rank, inputs]."""

    rank: int
    edges: tuple[int, int] = (1, 1)

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        return {
            f"{name}.weight_left": WantedTensor((outputs, self.rank)),
            f"{name}.weight_right": WantedTensor((self.rank, inputs)),
        }

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.weights import LowRankWeight

        left = weights.read(f"{cut.name}.weight_left", (cut.outputs, self.rank), (cut.rows,))
        every = slice(0, self.rank)
        return LowRankWeight(
            left, weights.read(f"{cut.name}.weight_right", (self.rank, cut.inputs), (every, cut.columns))
        )


@dataclass(frozen=True, slots=True)
class LowRankModules:
    """The storage of a matrix by its name."""

    ranks: tuple[tuple[str, int], ...]

    def storage_of(self, name: str) -> MatrixStorage:
        """As in StorageRule."""
        rank = dict(self.ranks).get(name)
        return PLAIN if rank is None else LowRankStorage(rank)


def read(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """From quantization_config. Raises ModelError."""
    options = Options(quantization, where)
    options.known("quant_method", "ranks")
    ranks = options.object("ranks")
    if ranks is None:
        raise ModelError(f"{where}.ranks: missing")
    found = {name: ranks.integer(name, None) for name in ranks.raw}
    for name, rank in found.items():
        if rank < 1:
            raise ModelError(f"{where}.ranks.{name}={rank} must be at least 1")
    return StoredFormat(LowRankModules(tuple(found.items())))


QUANT_METHODS = (QuantMethod("low_rank", read),)
