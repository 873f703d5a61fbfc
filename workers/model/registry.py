"""Which families and weight formats there are, those of `model.plugins` too, and the reading of a model directory.

A plugin is a module that can be imported and has FAMILIES, a tuple of Family, or QUANT_METHODS, a tuple of QuantMethod.
It should import torch no earlier than its layers do: all of this runs before anything starts. Without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from checkpoint.end_tokens import end_token_ids
from checkpoint.errors import CheckpointError
from checkpoint.files import read_json
from checkpoint.keys import check_keys
from workers.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.config_fields import ConfigFields
from workers.model.families import llama, qwen3
from workers.model.family import Family
from workers.model.quant import (
    awq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    gptq,
    low_rank,
    modelopt,
    mxfp4,
)
from workers.model.quant.plain import PLAIN_FORMAT
from workers.model.weight_format import QuantMethod, WeightFormat

_BUILT_IN: tuple[ModuleType, ...] = (
    llama,
    qwen3,
    awq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    gptq,
    low_rank,
    modelopt,
    mxfp4,
)

_MODELOPTS = "hf_quant_config.json"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Registry:
    """What can be served."""

    families: Mapping[str, Family]  # by architecture
    quant_methods: Mapping[str, QuantMethod]  # by quant_method

    def family(self, raw: Mapping[str, Any], path: Path) -> Family:
        """That of a config.json, whose keys it knows. Raises ModelError."""
        architectures = raw.get("architectures")
        architecture = architectures[0] if isinstance(architectures, list) and architectures else "(none named)"
        family = self.families.get(architecture) if isinstance(architecture, str) else None
        if family is None:
            supported = ", ".join(self.families)
            raise ModelError(f"{path}: architecture {architecture} is not supported (supported: {supported})")
        try:
            check_keys(raw, family.keys, path)
        except CheckpointError as error:
            raise ModelError(str(error)) from None
        if raw.get("model_type") not in (None, family.model_type):
            wanted = f"{family.model_type!r} for {family.architecture}"
            raise ModelError(f"{path}: model_type must be {wanted}, not {raw['model_type']!r}")
        return family

    def weight_format(self, raw: Mapping[str, Any], path: Path) -> WeightFormat:
        """How the weights are stored by a config.json, and what is beside it. Raises ModelError."""
        key = "quantization_config" if raw.get("quantization_config") is not None else "compression_config"
        quantization = raw.get(key)
        where = f"{path}: {key}"
        if quantization is None:
            quantization, where = _modelopts_own(path), f"{path.with_name(_MODELOPTS)}: quantization"
        if quantization is None:
            return PLAIN_FORMAT
        if not isinstance(quantization, dict):
            raise ModelError(f"{where} must be an object, not {quantization!r}")
        name = quantization.get("quant_method")
        method = self.quant_methods.get(name) if isinstance(name, str) else None
        if method is None:
            served = ", ".join(self.quant_methods) or "none but plain weights"
            raise ModelError(f"{where}.quant_method={name!r} is not served (served: {served})")
        return method.read(quantization, where)


def load_registry(plugins: Sequence[str] = ()) -> Registry:
    """What is built in and what these modules bring. Raises ModelError naming model.plugins."""
    modules = [*_BUILT_IN, *map(_import_plugin, plugins)]
    families = [(family.architecture, family, module) for module in modules for family in _families(module)]
    methods = [(method.name, method, module) for module in modules for method in _quant_methods(module)]
    return Registry(_by_name("architecture", families), _by_name("quant_method", methods))


def load_config(directory: str | Path, ignore_keys: Collection[str] = (), plugins: Sequence[str] = ()) -> ModelConfig:
    """Read a model directory. Raises ModelError naming the file or field.

    ignore_keys: of config.json, that are passed over though nothing is known of them. plugins: see load_registry.
    """
    registry = load_registry(plugins)
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory")
    path = directory / "config.json"
    try:
        raw = read_json(path, is_required=True, ignored=ignore_keys)
        generation = read_json(directory / "generation_config.json", ignored=ignore_keys)
        family = registry.family(raw, path)
        end_ids = end_token_ids(raw, generation, directory)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    weight_format = registry.weight_format(raw, path)
    fields = ConfigFields(raw, path, family.architecture, family.defaults, end_ids, weight_format)
    is_built_in = any(family in _families(module) for module in _BUILT_IN)
    return family.read(fields) if is_built_in else _read_by_plugin(family, fields)


def _modelopts_own(path: Path) -> dict[str, Any] | None:
    """What its older versions say in a file of their own, beside config.json."""
    try:
        content = read_json(path.with_name(_MODELOPTS))
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    said = content.get("quantization")
    return {"quant_method": "modelopt", **said} if isinstance(said, dict) else None


def _read_by_plugin(family: Family, fields: ConfigFields) -> ModelConfig:
    try:
        model = family.read(fields)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # whatever its code does wrong
        raise ModelError(f"model.plugins: reading {fields.path} as {family.architecture}: {_gist(error)}") from None
    if not isinstance(model, ModelConfig):
        wrong = type(model).__name__
        raise ModelError(f"model.plugins: {family.architecture}: read gives a ModelConfig, not {wrong}")
    return model


def _import_plugin(name: str) -> ModuleType:
    try:
        module = import_module(name)
    except SystemExit:
        raise ModelError(f"model.plugins: {name} cannot be imported (it exits)") from None
    except Exception as error:  # whatever its code does wrong
        raise ModelError(f"model.plugins: {name} cannot be imported ({_gist(error)})") from None
    built_in = [family for other in _BUILT_IN for family in _families(other)]
    if all(family in built_in for family in _families(module)) and not _quant_methods(module):
        raise ModelError(f"model.plugins: {name} has neither FAMILIES nor QUANT_METHODS of its own, so it adds nothing")
    return module


def _gist(error: BaseException) -> str:
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def _families(module: ModuleType) -> tuple[Family, ...]:
    families = _listed(module, "FAMILIES", Family)
    for family in families:
        texts = (family.architecture, family.model_type)
        is_whole = isinstance(family.keys, Mapping) and isinstance(family.defaults, Mapping) and callable(family.read)
        if not is_whole or not all(isinstance(text, str) for text in texts):
            raise ModelError(f"model.plugins: {module.__name__}: a Family of FAMILIES has a field of another type")
    return families


def _quant_methods(module: ModuleType) -> tuple[QuantMethod, ...]:
    methods = _listed(module, "QUANT_METHODS", QuantMethod)
    if not all(isinstance(method.name, str) and callable(method.read) for method in methods):
        raise ModelError(
            f"model.plugins: {module.__name__}: a QuantMethod of QUANT_METHODS has a field of another type"
        )
    return methods


def _listed(module: ModuleType, name: str, kind: type[T]) -> tuple[T, ...]:
    """What a module declares, which foreign code may do wrong."""
    found = getattr(module, name, ())
    wrong = [found] if not isinstance(found, tuple | list) else [each for each in found if not isinstance(each, kind)]
    if wrong:
        said = f"{name} must be a tuple of {kind.__name__}, and has a value of type {type(wrong[0]).__name__}"
        raise ModelError(f"model.plugins: {module.__name__}: {said}")
    return tuple(found)


def _by_name(kind: str, entries: Iterable[tuple[str, T, ModuleType]]) -> dict[str, T]:
    found: dict[str, T] = {}
    modules: dict[str, str] = {}
    for name, entry, module in entries:
        if name in found and found[name] is not entry:
            raise ModelError(f"model.plugins: {kind} {name} is in both {modules[name]} and {module.__name__}")
        found[name], modules[name] = entry, module.__name__
    return found
