"""AWQ (arXiv:2306.00978) in its `gemm` layout, as AutoAWQ and others write it.

Unknown keys of quantization_config are passed over, as in GPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.quant.integers import num_groups
from workers.model.quant.options import Options
from workers.model.quant.plain import PLAIN
from workers.model.quant.storage import Cut, MatrixStorage, StoredFormat
from workers.model.weight_format import QuantMethod

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.loader import Weights
    from workers.model.quant.weights import QuantWeight

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each of 8 outputs in a word
_PER_WORD = 8


@dataclass(frozen=True, slots=True)
class AwqStorage:
    """NAME.qweight int32 [inputs, outputs / 8], NAME.qzeros int32 [groups, outputs / 8], NAME.scales [groups, outputs].
    A word has 8 outputs in the order 0, 2, 4, 6, 1, 3, 5, 7, the first lowest."""

    group_size: int  # 0: all inputs
    has_zeros: bool

    @property
    def edges(self) -> tuple[int, int]:
        """As in MatrixStorage."""
        return _PER_WORD, self.group_size or 1

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        if outputs % _PER_WORD:
            raise ModelError(f"{name}: its {outputs} outputs do not fill words of {_PER_WORD}")
        groups = num_groups(name, inputs, self.group_size)
        words = outputs // _PER_WORD
        return {
            f"{name}.qweight": WantedTensor((inputs, words), ("I32",)),
            f"{name}.qzeros": WantedTensor((groups, words), ("I32",), is_optional=not self.has_zeros),
            f"{name}.scales": WantedTensor((groups, outputs)),
        }

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.weights import GroupedWeight

        name, groups = cut.name, num_groups(cut.name, cut.inputs, self.group_size)
        which = slice(0, 1)
        if self.group_size:
            which = slice(cut.columns.start // self.group_size, cut.columns.stop // self.group_size)
        words = slice(cut.rows.start // _PER_WORD, cut.rows.stop // _PER_WORD)
        num_words = cut.outputs // _PER_WORD
        packed = weights.read(f"{name}.qweight", (cut.inputs, num_words), (cut.columns, words), as_stored=True)
        scales = weights.read(f"{name}.scales", (groups, cut.outputs), (which, cut.rows), as_stored=True)
        zeros = None
        if self.has_zeros:
            packed_zeros = weights.read(f"{name}.qzeros", (groups, num_words), (which, words), as_stored=True)
            zeros = _unpack(packed_zeros).T.contiguous()
        return GroupedWeight(_unpack(packed).T.contiguous(), scales.float().T.contiguous(), 4, zeros)


def _unpack(words: Tensor) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, 8 * words]."""
    from workers.model.quant.words import unpack

    codes: Tensor = unpack(words, 4).unflatten(-1, (-1, _PER_WORD))
    return codes[..., list(_ORDER)].flatten(-2)


@dataclass(frozen=True, slots=True)
class AwqModules:
    """The storage of a matrix by its name."""

    storage: AwqStorage
    plain: tuple[str, ...]  # parts of names

    def storage_of(self, name: str) -> MatrixStorage:
        """As in StorageRule."""
        is_plain = ".layers." not in name or any(part in name for part in self.plain)
        return PLAIN if is_plain else self.storage


def read(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """From quantization_config. Raises ModelError."""
    options = Options(quantization, where)
    options.one_of("bits" if "bits" in quantization else "w_bit", (4,))
    for key in ("version", "checkpoint_format", "format"):
        if isinstance(quantization.get(key), str) and quantization[key].lower() != "gemm":
            raise ModelError(f"{where}.{key}={quantization[key]!r} is not served (served: 'gemm')")
    options.one_of("lm_head", (False,), False)
    group_size = options.integer("group_size" if "group_size" in quantization else "q_group_size", 128)
    if group_size != -1 and group_size <= 0:
        raise ModelError(f"{where}.group_size={group_size} is not served (served: -1 and positive numbers)")
    has_zeros = options.flag("zero_point", not options.flag("sym"))
    return StoredFormat(AwqModules(AwqStorage(max(0, group_size), has_zeros), options.texts("modules_to_not_convert")))


QUANT_METHODS = (QuantMethod("awq", read),)
