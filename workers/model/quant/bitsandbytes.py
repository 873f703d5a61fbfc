"""bitsandbytes: NF4 and FP4 (QLoRA, arXiv:2305.14314), with scales that may be quantized again, and LLM.int8
(arXiv:2208.07339)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.quant.modules import DecoderMatrices
from workers.model.quant.options import Options
from workers.model.quant.storage import Cut, MatrixStorage, StoredFormat
from workers.model.weight_format import QuantMethod

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.loader import Weights
    from workers.model.quant.weights import QuantWeight

_BLOCK = 64  # numbers with one scale
_NESTED_BLOCK = 256  # scales with one scale
_KEYS = (
    "quant_method",
    "_load_in_4bit",
    "_load_in_8bit",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
)


@dataclass(frozen=True, slots=True)
class FourBitStorage:
    """NAME.weight uint8 [outputs * inputs / 2, 1], codes row by row, the first one high; NAME.weight.quant_map fp32
    [16] is what they stand for, NAME.weight.absmax fp32 the scale of each 64 of them. Double quantization: absmax is
    uint8, codes of NAME.weight.nested_quant_map, times NAME.weight.nested_absmax per 256, plus an offset that the JSON
    text in NAME.weight.quant_state has."""

    kind: str  # nf4 or fp4
    is_double: bool

    @property
    def edges(self) -> tuple[int, int]:
        """As in MatrixStorage."""
        return 1, _BLOCK

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        if inputs % _BLOCK:
            raise ModelError(f"{name}: blocks of {_BLOCK} do not divide its {inputs} inputs")
        blocks = outputs * inputs // _BLOCK
        wanted = {
            f"{name}.weight": WantedTensor((outputs * inputs // 2, 1), ("U8",)),
            f"{name}.weight.absmax": WantedTensor((blocks,), ("U8",) if self.is_double else ("F32",)),
            f"{name}.weight.quant_map": WantedTensor((16,), ("F32",)),
            self._state(name): WantedTensor((), ("U8",), has_any_shape=True),
        }
        if self.is_double:
            wanted[f"{name}.weight.nested_absmax"] = WantedTensor((-(-blocks // _NESTED_BLOCK),), ("F32",))
            wanted[f"{name}.weight.nested_quant_map"] = WantedTensor((256,), ("F32",))
        return wanted

    def _state(self, name: str) -> str:
        return f"{name}.weight.quant_state.bitsandbytes__{self.kind}"

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.weights import GroupedWeight
        from workers.model.quant.words import nibbles

        name, inputs = cut.name, cut.inputs
        state = self._read_state(weights, cut)
        row_bytes, row_blocks = inputs // 2, inputs // _BLOCK
        numbers = slice(cut.rows.start * row_bytes, cut.rows.stop * row_bytes)
        packed = weights.read(f"{name}.weight", (cut.outputs * row_bytes, 1), (numbers,), as_stored=True)
        codes = nibbles(packed.view(-1, row_bytes), high_first=True)[:, cut.columns]
        blocks = cut.outputs * row_blocks
        mine = slice(cut.rows.start * row_blocks, cut.rows.stop * row_blocks)
        scales = weights.read(f"{name}.weight.absmax", (blocks,), (mine,), as_stored=True)
        if self.is_double:
            scales = self._nested(weights, name, scales, blocks, mine, state)
        columns = slice(cut.columns.start // _BLOCK, cut.columns.stop // _BLOCK)
        table = weights.read(f"{name}.weight.quant_map", (16,), as_stored=True)
        return GroupedWeight(codes.contiguous(), scales.view(-1, row_blocks)[:, columns].contiguous(), 4, table=table)

    def _read_state(self, weights: Weights, cut: Cut) -> Mapping[str, Any]:
        where = self._state(cut.name)
        shape = weights.shape_of(where)
        if shape is None:
            raise ModelError(f"no tensor {where}")
        try:
            state = json.loads(bytes(weights.read(where, shape, as_stored=True).tolist()))
        except ValueError as error:
            raise ModelError(f"{where} is not a JSON text ({error})") from None
        wanted = {"blocksize": _BLOCK, "quant_type": self.kind, "shape": [cut.outputs, cut.inputs]}
        if self.is_double:
            wanted["nested_blocksize"] = _NESTED_BLOCK
        for key, value in wanted.items():
            if not isinstance(state, dict) or state.get(key) != value:
                found = state.get(key) if isinstance(state, dict) else state
                raise ModelError(f"{where}: {key} is {found!r}, where {value!r} is served")
        return dict(state)

    def _nested(
        self, weights: Weights, name: str, codes: Tensor, blocks: int, mine: slice, state: Mapping[str, Any]
    ) -> Tensor:
        offset = state.get("nested_offset")
        if not isinstance(offset, int | float):
            raise ModelError(f"{self._state(name)}: nested_offset is {offset!r}, and must be a number")
        table = weights.read(f"{name}.weight.nested_quant_map", (256,), as_stored=True)
        shape = (-(-blocks // _NESTED_BLOCK),)
        absmax = weights.read(f"{name}.weight.nested_absmax", shape, as_stored=True)
        scales: Tensor = table[codes.int()] * absmax.repeat_interleave(_NESTED_BLOCK)[mine] + offset
        return scales


@dataclass(frozen=True, slots=True)
class EightBitStorage:
    """NAME.weight int8 [outputs, inputs] and NAME.SCB fp32 [outputs]: the largest magnitude of each row."""

    threshold: float  # of inputs that are multiplied unrounded

    edges: tuple[int, int] = (1, 1)

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        return {
            f"{name}.weight": WantedTensor((outputs, inputs), ("I8",)),
            f"{name}.SCB": WantedTensor((outputs,), ("F32",)),
            f"{name}.weight_format": WantedTensor((), ("U8",), is_optional=True),
        }

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.weights import Int8Weight

        shape, part = (cut.outputs, cut.inputs), (cut.rows, cut.columns)
        codes = weights.read(f"{cut.name}.weight", shape, part, as_stored=True)
        scales = weights.read(f"{cut.name}.SCB", (cut.outputs,), (cut.rows,), as_stored=True) / 127.0
        return Int8Weight(codes, scales, outlier_threshold=self.threshold)


def read(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """From quantization_config. Raises ModelError."""
    options = Options(quantization, where)
    options.known(*_KEYS)
    storage: MatrixStorage
    if options.flag("load_in_4bit", options.flag("_load_in_4bit")):
        options.one_of("bnb_4bit_quant_storage", ("uint8",), "uint8")
        kind = options.one_of("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
        storage = FourBitStorage(kind, options.flag("bnb_4bit_use_double_quant"))
    elif options.flag("load_in_8bit", options.flag("_load_in_8bit")):
        storage = EightBitStorage(options.number("llm_int8_threshold", 6.0))
    else:
        raise ModelError(f"{where}: neither load_in_4bit nor load_in_8bit")
    return StoredFormat(DecoderMatrices(storage, options.texts("llm_int8_skip_modules")))


QUANT_METHODS = (QuantMethod("bitsandbytes", read),)
