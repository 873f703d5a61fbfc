"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel write it.

Version 1 stores each zero point less one, version 2 as it is. Some files are labelled 1 and hold version 2: where zeros
are symmetric, their words tell (0x7777... is 1, 0x8888... is 2), and count more than the label.

Writers note in quantization_config how they made a file, under ever new names: unknown keys are passed over. The names
and shapes of the tensors show what a matrix is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.quant.integers import grouped, groups_of, num_groups
from workers.model.quant.options import Options, check_pattern
from workers.model.quant.plain import PLAIN
from workers.model.quant.storage import Cut, MatrixStorage, StoredFormat
from workers.model.weight_format import QuantMethod

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.loader import Weights
    from workers.model.quant.weights import QuantWeight

_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class GptqStorage:
    """NAME.qweight int32 [inputs * bits / 32, outputs], the first input lowest; NAME.scales [groups, outputs];
    NAME.qzeros int32 [groups, outputs * bits / 32]; NAME.g_idx int32 [inputs]: the group of each input."""

    bits: int
    group_size: int  # 0: all inputs
    is_ordered_by_activations: bool
    is_symmetric: bool
    has_zeros_less_one: bool

    @property
    def edges(self) -> tuple[int, int]:
        """As in MatrixStorage."""
        per_words, _ = self._packing
        group = 1 if self.is_ordered_by_activations else self.group_size or 1
        return per_words, math.lcm(per_words, group)

    @property
    def _packing(self) -> tuple[int, int]:
        """Codes that fill a whole number of words, and that number."""
        return (32 // self.bits, 1) if 32 % self.bits == 0 else (32, self.bits)

    def _words(self, codes: int) -> int:
        per_words, words = self._packing
        return -(-codes // per_words) * words

    def _part(self, codes: slice) -> slice:
        return slice(self._words(codes.start), self._words(codes.stop))

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        groups = num_groups(name, inputs, self.group_size)
        return {
            f"{name}.qweight": WantedTensor((self._words(inputs), outputs), ("I32",)),
            f"{name}.scales": WantedTensor((groups, outputs)),
            f"{name}.qzeros": WantedTensor((groups, self._words(outputs)), ("I32",)),
            f"{name}.g_idx": WantedTensor((inputs,), ("I32", "I64"), is_optional=not self.is_ordered_by_activations),
            # Old writers give every matrix a bias.
            f"{name}.bias": WantedTensor((outputs,), is_optional=True),
        }

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.words import unpack

        name, wanted = cut.name, self.tensors(cut.name, cut.outputs, cut.inputs)

        def part_of(kind: str, part: tuple[slice, ...]) -> Tensor:
            return weights.read(f"{name}.{kind}", wanted[f"{name}.{kind}"].shape, part, as_stored=True)

        words = part_of("qweight", (self._part(cut.columns), cut.rows))
        codes = unpack(words.T.contiguous(), self.bits)[:, : cut.columns.stop - cut.columns.start].contiguous()
        g_idx = part_of("g_idx", (cut.columns,)) if self.is_ordered_by_activations else None
        groups = groups_of(cut, self.group_size, g_idx is not None)
        scales = part_of("scales", (groups, cut.rows)).float().T.contiguous()
        zeros = self._zeros(unpack(part_of("qzeros", (groups, self._part(cut.rows))), self.bits)[:, : len(codes)])
        return grouped(name, codes, scales, None if zeros is None else zeros.T.contiguous(), g_idx, self.bits)

    def _zeros(self, stored: Tensor) -> Tensor | None:
        """uint8 [groups, outputs]; None where all are the middle."""
        middle = 2 ** (self.bits - 1)
        if self.is_symmetric and bool(((stored == middle) | (stored == middle - 1)).all()):
            return None
        # Less one and below 0 is the largest code: a zero point of 2 ** bits wraps to no other number.
        return stored + 1 if self.has_zeros_less_one else stored


@dataclass(frozen=True, slots=True)
class GptqModules:
    """The storage of a matrix by its name."""

    default: GptqStorage
    overrides: tuple[tuple[str, MatrixStorage], ...]  # of the first pattern that a name begins with
    has_quantized_head: bool
    plain: tuple[str, ...]  # parts of names

    def storage_of(self, name: str) -> MatrixStorage:
        """As in StorageRule."""
        if ".layers." not in name:
            return self.default if self.has_quantized_head and name == "lm_head" else PLAIN
        for pattern, storage in self.overrides:
            if re.match(pattern, name):
                return storage
        return PLAIN if any(part in name for part in self.plain) else self.default


def read(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """From quantization_config. Raises ModelError."""
    options = Options(quantization, where)
    options.one_of("pack_dtype", ("int32",), "int32")
    default = _storage(options, None)
    overrides: list[tuple[str, MatrixStorage]] = []
    dynamic = options.object("dynamic")
    for key in dynamic.raw if dynamic is not None else ():
        assert dynamic is not None
        pattern = check_pattern(key[2:] if key[:2] in ("+:", "-:") else key, dynamic.where)
        changes = dynamic.object(key)
        if key.startswith("-:") or changes is None:
            overrides.append((pattern, PLAIN))
        else:
            overrides.append((pattern, _storage(changes, default)))
    return StoredFormat(
        GptqModules(default, tuple(overrides), options.flag("lm_head"), options.texts("modules_to_not_convert"))
    )


def _storage(options: Options, default: GptqStorage | None) -> GptqStorage:
    """default: what an override does not say."""
    bits = options.one_of("bits", _BITS, default.bits if default else None)
    group_size = options.integer("group_size", default.group_size or -1 if default else None)
    if group_size != -1 and (group_size <= 0 or group_size % 32):
        raise ModelError(f"{options.where}.group_size={group_size} is not served (served: -1 and multiples of 32)")
    if default is not None:
        less_one = default.has_zeros_less_one
    else:
        less_one = options.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq"
    return GptqStorage(
        bits,
        max(0, group_size),
        options.flag("desc_act", default.is_ordered_by_activations if default else False),
        options.flag("sym", default.is_symmetric if default else True),
        less_one,
    )


QUANT_METHODS = (QuantMethod("gptq", read),)
