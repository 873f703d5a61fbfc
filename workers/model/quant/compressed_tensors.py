"""The format of the library compressed-tensors (llm-compressor and others write it).

quantization_config has groups; each says what its modules' weights and inputs are, and `format` how the weights are
packed. A module is of the first group one of whose targets is its name, a pattern that its name begins with (re:...),
or its class, which here is Linear for every matrix but the embedding. What a group does not take, or `ignore` names, is
plain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.errors import ModelError
from workers.model.quant.floats import Fp4Storage, Fp8Storage
from workers.model.quant.integers import InputRounding, IntegerStorage, PackedStorage
from workers.model.quant.options import Options, check_pattern
from workers.model.quant.plain import PLAIN, PlainStorage
from workers.model.quant.storage import MatrixStorage, StoredFormat
from workers.model.weight_format import QuantMethod

_EMBEDDING = "model.embed_tokens"
_TOP_KEYS = (
    "quant_method",
    "format",
    "ignore",
    "kv_cache_scheme",
    "config_groups",
    "sparsity_config",
    "transform_config",
    "quantization_status",
    "global_compression_ratio",
    "version",
)
_GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGUMENT_KEYS = (
    "num_bits",
    "type",
    "symmetric",
    "strategy",
    "group_size",
    "block_structure",
    "dynamic",
    "actorder",
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "zp_dtype",
)


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Modules that are stored alike."""

    targets: tuple[str, ...]
    storage: MatrixStorage


@dataclass(frozen=True, slots=True)
class ModuleGroups:
    """The storage of a matrix by its name."""

    groups: tuple[ModuleGroup, ...]
    ignored: tuple[str, ...]

    def storage_of(self, name: str) -> MatrixStorage:
        """As in StorageRule."""
        if any(_matches(target, name) for target in self.ignored):
            return PLAIN
        for group in self.groups:
            if any(_matches(target, name) for target in group.targets):
                return group.storage
        return PLAIN


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name or (target == "Linear" and name != _EMBEDDING)


def read(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """From quantization_config. Raises ModelError."""
    options = Options(quantization, where)
    options.known(*_TOP_KEYS)
    for key in ("sparsity_config", "transform_config"):
        nested = options.object(key)
        if nested is not None and nested.raw and nested.raw.get("format") != "dense":
            raise ModelError(f"{where}.{key} is not served")
    groups = options.object("config_groups")
    if groups is None or not groups.raw:
        return StoredFormat(ModuleGroups((), ()))
    default = options.text("format", "dense")
    parsed = []
    for name in groups.raw:
        group = groups.object(name)
        if group is not None:
            parsed.append(_group(group, default))
    ignored = tuple(_target(target, f"{where}.ignore") for target in options.texts("ignore"))
    return StoredFormat(ModuleGroups(tuple(parsed), ignored))


def _target(target: str, where: str) -> str:
    if target.startswith("re:"):
        check_pattern(target[3:], where)
    return target


def _group(group: Options, default_format: str) -> ModuleGroup:
    group.known(*_GROUP_KEYS)
    if group.object("output_activations") is not None:
        raise ModelError(f"{group.where}.output_activations is not served")
    targets = tuple(_target(target, f"{group.where}.targets") for target in group.texts("targets"))
    weights, inputs = group.object("weights"), group.object("input_activations")
    if weights is None:
        return ModuleGroup(targets, PLAIN)
    for arguments in (weights, inputs):
        if arguments is not None:
            arguments.known(*_ARGUMENT_KEYS)
    return ModuleGroup(targets, _storage(group.text("format", default_format), weights, inputs))


def _storage(packing: str, weights: Options, inputs: Options | None) -> MatrixStorage:
    kind, bits = weights.one_of("type", ("int", "float"), "int"), weights.integer("num_bits", 8)
    if packing == "naive-quantized":  # of older versions: whatever the type is, a byte each
        packing = f"{kind}-quantized"
    match packing, kind, bits:
        case "pack-quantized", "int", 2 | 4 | 8:
            return _packed(weights, inputs, bits)
        case "int-quantized", "int", 4 | 8:
            return _integers(weights, inputs, bits)
        case "float-quantized", "float", 8:
            return _fp8(weights, inputs)
        case (("mxfp4-pack-quantized" | "nvfp4-pack-quantized"), "float", 4):
            return _fp4(packing, weights)
        case "dense", _, _:
            return PlainStorage()
    raise ModelError(f"{weights.where}: {bits} bits of type {kind} in format {packing!r} are not served")


def _packed(weights: Options, inputs: Options | None, bits: int) -> PackedStorage:
    strategy = weights.one_of("strategy", ("group", "channel", "tensor_group"), "group")
    group_size = 0 if strategy == "channel" else _group_size(weights)
    weights.one_of("actorder", (None, "static", "weight", "group", "dynamic"))
    return PackedStorage(bits, group_size, weights.flag("symmetric", True), _rounds_inputs(inputs))


def _group_size(weights: Options) -> int:
    size = weights.integer("group_size", 0)
    if size == -1:
        return 0
    if size <= 0 or size % 8:
        raise ModelError(f"{weights.where}.group_size={size} is not served (served: multiples of 8)")
    return size


def _rounds_inputs(inputs: Options | None) -> bool:
    """Whether inputs are rounded to 8-bit integers, each row by itself."""
    if inputs is None:
        return False
    inputs.one_of("type", ("int",), "int")
    inputs.one_of("num_bits", (8,), 8)
    inputs.one_of("strategy", ("token", "tensor"), "token")
    inputs.one_of("dynamic", (True,), False)
    inputs.one_of("symmetric", (True,), True)
    return True


def _integers(weights: Options, inputs: Options | None, bits: int) -> IntegerStorage:
    strategy = weights.one_of("strategy", ("channel", "tensor", "group"), "tensor")
    weights.one_of("symmetric", (True,), True)
    group_size = _group_size(weights) if strategy == "group" else 0
    if inputs is None or inputs.flag("dynamic"):
        return IntegerStorage(bits, group_size, "row" if _rounds_inputs(inputs) else "none")
    inputs.one_of("type", ("int",), "int")
    inputs.one_of("num_bits", (8,), 8)
    inputs.one_of("strategy", ("tensor",), "tensor")
    if group_size:
        raise ModelError(f"{inputs.where}: a fixed scale of the inputs with groups of weights is not served")
    return IntegerStorage(bits, 0, "fixed", has_input_zero=not inputs.flag("symmetric", True))


def _fp8(weights: Options, inputs: Options | None) -> Fp8Storage:
    strategy = weights.one_of("strategy", ("channel", "tensor", "block"), "tensor")
    weights.one_of("symmetric", (True,), True)
    if strategy == "block" and weights.raw.get("block_structure") not in ([128, 128], "128x128"):
        shape = weights.raw.get("block_structure")
        raise ModelError(f"{weights.where}.block_structure={shape!r} is not served (served: [128, 128])")
    rounding: InputRounding = "none"
    if inputs is not None:
        inputs.one_of("type", ("float",), "float")
        inputs.one_of("num_bits", (8,), 8)
        inputs.one_of("strategy", ("token", "tensor", "group"), "tensor")
        rounding = "row" if inputs.flag("dynamic") else "fixed"
    return Fp8Storage("weight_scale", has_blocks=strategy == "block", input_rounding=rounding)


def _fp4(packing: str, weights: Options) -> Fp4Storage:
    group_size = 16 if packing.startswith("nvfp4") else 32
    weights.one_of("group_size", (group_size,), group_size)
    return Fp4Storage(group_size, has_global_scale=group_size == 16)


QUANT_METHODS = (QuantMethod("compressed-tensors", read),)
