"""Reads adapter_config.json as PEFT writes it for LoRA (arXiv:2106.09685). Knows nothing of tensors or models."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.adapters.layers import AROUND_PATTERN, ChosenLayers
from checkpoint.adapters.patterns import problem_of
from checkpoint.errors import CheckpointError
from checkpoint.keys import Key, check_keys, harmless, refused, understood

CONFIG_NAME = "adapter_config.json"
MAX_RANK = 1 << 20  # of any matrix; what a cluster serves is bounded by max_lora_rank

_END_OF_NAME = r"(.*\.)?({})$"  # what PEFT matches the keys of rank_pattern and alpha_pattern within
_MAX_NUMBER = sys.float_info.max
_LONGEST_SHOWN = 60  # characters of a value in an error
_TRAINING = harmless("of training")
_NEW_BASE = "it begins with other weights of the base, which are not in the adapter"
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "lora_ga")
_KEYS: dict[str, Key] = {
    "peft_type": understood("LORA"),
    "r": understood("rank"),
    "lora_alpha": understood("scale: lora_alpha / r"),
    "target_modules": understood("which modules have tensors"),
    "exclude_modules": understood("which modules have none"),
    "layers_to_transform": understood("of which layers"),
    "layers_pattern": understood("what comes before a layer's number"),
    "rank_pattern": understood("ranks of some modules"),
    "alpha_pattern": understood("lora_alpha of some modules"),
    "use_rslora": understood("scale: lora_alpha / sqrt(r)"),
    "base_model_name_or_path": understood("for messages"),
    "task_type": refused("only adapters of causal language models", "CAUSAL_LM"),
    "bias": refused("biases that are trained, too", "none"),
    "lora_bias": refused("biases of the added products", False),
    "use_dora": refused("DoRA", False),
    "modules_to_save": refused("modules that are saved whole", []),
    "trainable_token_indices": refused("embeddings of new tokens", [], {}),
    "target_parameters": refused("parameters that are not modules", []),
    "fan_in_fan_out": refused("weights that lie [in, out]", False),
    "layer_replication": refused("layers that come twice", []),
    "alora_invocation_tokens": refused("an adapter from some token on", []),
    "use_qalora": refused("QA-LoRA", False),
    "use_bdlora": refused("block-diagonal LoRA", False, {}),
    "arrow_config": refused("Arrow", {}),
    "kasa_config": refused("KaSA", {}),
    "monteclora_config": refused("MonteCLoRA", {}),
    "velora_config": _TRAINING,
    "init_lora_weights": refused(_NEW_BASE, *_PLAIN_INITS),
    "loftq_config": _TRAINING,
    "eva_config": _TRAINING,
    "corda_config": _TRAINING,
    "lora_ga_config": _TRAINING,
    "lora_dropout": _TRAINING,
    "inference_mode": _TRAINING,
    "megatron_config": _TRAINING,
    "megatron_core": _TRAINING,
    "runtime_config": harmless("how PEFT computes"),
    "qalora_group_size": harmless("only with use_qalora"),
    "ensure_weight_tying": harmless("only with modules_to_save"),
    "auto_mapping": harmless("PEFT's own classes"),
    "peft_version": harmless("who wrote it"),
    "revision": harmless("of the base"),
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What adapter_config.json says of the tensors."""

    path: Path
    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    """Ends of names; or a regular expression that a whole name must match, or "all-linear"."""
    exclude_modules: tuple[str, ...] | str
    layers: ChosenLayers | None
    """None: all. Modules that target_modules gives by their whole names are targets in any layer."""
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    base_model: str
    """What the adapter was made for; a name for messages, nothing is compared with it."""

    def rank_of(self, module: str) -> int:
        """Of a module's matrices; module: its name in the base model."""
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What B A x is multiplied by."""
        alpha = self.alpha_pattern.get(_pattern_of(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def is_target(self, module: str) -> bool:
        """Whether the adapter changes a linear module of this name, by target_modules, exclude_modules and layers."""
        if self.exclude_modules and _matches(self.exclude_modules, module):
            return False
        if self.target_modules == "all-linear":
            return True
        if not _matches(self.target_modules, module):
            return False
        return self.layers is None or module in self.target_modules or self.layers.has(module)


def _matches(wanted: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _pattern_of(patterns: Mapping[str, object], module: str) -> str:
    """The first pattern that the end of the name matches, as in PEFT."""
    return next((key for key in patterns if re.match(_END_OF_NAME.format(key), module)), module)


def read_config(raw: Mapping[str, Any], path: Path) -> LoraConfig:
    """raw: the content of the file. Raises CheckpointError, which names the file and the key."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type={_shown(kind)} is not supported: only LORA is")
    check_keys(raw, _KEYS, path, if_unknown="")
    target_modules = _modules(raw.get("target_modules"), f"{path}: target_modules", is_required=True)
    return LoraConfig(
        path=path,
        rank=_rank(raw.get("r"), f"{path}: r"),
        alpha=_number(raw.get("lora_alpha"), f"{path}: lora_alpha"),
        target_modules=target_modules,
        exclude_modules=_modules(raw.get("exclude_modules"), f"{path}: exclude_modules"),
        layers=_layers(raw, isinstance(target_modules, str), path),
        rank_pattern={key: _rank(value, where) for key, value, where in _patterns(raw, "rank_pattern", path)},
        alpha_pattern={key: _number(value, where) for key, value, where in _patterns(raw, "alpha_pattern", path)},
        use_rslora=_flag(raw.get("use_rslora"), f"{path}: use_rslora"),
        base_model=str(raw.get("base_model_name_or_path") or ""),
    )


def _rank(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise CheckpointError(f"{where}: {_shown(value)} is not a rank (a whole number from 1 to {MAX_RANK})")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER:
        return float(value)
    raise CheckpointError(f"{where}: {_shown(value)} is not a number (of at most {_MAX_NUMBER:g})")


def _flag(value: object, where: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: {_shown(value)} is neither true nor false")
    return bool(value)


def _modules(value: object, where: str, is_required: bool = False) -> tuple[str, ...] | str:
    if value is None and not is_required:
        return ()
    if isinstance(value, str) and value:
        _check_pattern(value, where)
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value) and (value or not is_required):
        return tuple(value)
    raise CheckpointError(f"{where}: {_shown(value)} is neither a list of names nor a regular expression")


def _layers(raw: Mapping[str, Any], has_expression: bool, path: Path) -> ChosenLayers | None:
    """has_expression: target_modules is one. PEFT refuses the same combinations."""
    numbers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern")
    for name, value in (("layers_to_transform", numbers), ("layers_pattern", patterns)):
        if has_expression and value is not None:
            raise CheckpointError(f"{path}: {name}: is only possible where target_modules is a list of names")
    if numbers is None:
        if patterns:
            raise CheckpointError(f"{path}: layers_pattern: is only possible with layers_to_transform")
        return None
    numbers = numbers if isinstance(numbers, list) else [numbers]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise CheckpointError(f"{path}: layers_to_transform: {_shown(numbers)} is neither a layer's number nor a list")
    patterns = [] if patterns in (None, "") else [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise CheckpointError(f"{path}: layers_pattern: {_shown(patterns)} is neither a pattern nor a list of them")
    for pattern in patterns:
        _check_pattern(pattern, f"{path}: layers_pattern", AROUND_PATTERN)
    return ChosenLayers(frozenset(numbers), tuple(patterns)) if numbers else None


def _patterns(raw: Mapping[str, Any], name: str, path: Path) -> list[tuple[str, object, str]]:
    """Pattern, value, and what an error about it begins with."""
    patterns = raw.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {name}: {_shown(patterns)} is not an object")
    for key in patterns:
        _check_pattern(key, f"{path}: {name}", _END_OF_NAME)
    return [
        (key, value, f"{path}: {name}.{key if key.isprintable() else ascii(key)}") for key, value in patterns.items()
    ]


def _check_pattern(pattern: str, where: str, around: str = "{}") -> None:
    if problem := problem_of(pattern, around):
        raise CheckpointError(f"{where}: {_shown(pattern)} {problem}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
