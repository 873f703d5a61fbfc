"""The values of a config.json, checked as they are taken. Without torch. Knows nothing of what they are for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import ModelError
from workers.model.config import Decoder, ModelConfig
from workers.model.weight_format import WeightFormat

# Far above those of any model. Something is built per layer, expert or position before a weight file is looked at.
_LARGEST = {"num_hidden_layers": 4096, "num_experts": 4096, "max_position_embeddings": 2**27}
_LARGEST_OTHER = 2**24


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """A config.json whose keys are all known; each method raises ModelError naming the file and the key."""

    raw: Mapping[str, Any]
    path: Path
    architecture: str
    defaults: Mapping[str, int]  # what transformers takes for a key that is not there
    eos_token_ids: tuple[int, ...]
    weight_format: WeightFormat

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer. default: for null; for a key that is not there, where transformers has none."""
        value = self.raw.get(name, self.defaults.get(name))
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.wrong(name, "a positive integer", value)
        largest = _LARGEST.get(name, _LARGEST_OTHER)
        if value > largest:
            raise self.wrong(name, f"at most {largest}", value)
        return value

    def flag(self, name: str) -> bool:
        """true or false, the default."""
        value = self.raw.get(name)
        if not isinstance(value, bool | None):
            raise self.wrong(name, "true or false", value)
        return bool(value)

    def number(self, name: str, default: float, raw: Mapping[str, Any] | None = None) -> float:
        """A positive number."""
        value = (self.raw if raw is None else raw).get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.wrong(name, "a positive number", value)
        return float(value)

    def only(self, name: str, value: str) -> None:
        """Refuse every other value than this one and null."""
        if self.raw.get(name) not in (None, value):
            raise self.unsupported(f"{name}={self.raw[name]} is not supported (supported: {value})")

    def wrong(self, name: str, kind: str, value: object) -> ModelError:
        """The error of a value of another kind."""
        return self.unsupported(f"{name} must be {kind}, not {value!r}")

    def unsupported(self, what: str) -> ModelError:
        """The error of a value that is not served."""
        return ModelError(f"{self.path}: {what}")

    def model(self, decoder: Decoder) -> ModelConfig:
        """The whole config, where the sizes that all models have are under their usual names."""
        return ModelConfig(
            architecture=self.architecture,
            hidden_size=self.size("hidden_size"),
            num_hidden_layers=self.size("num_hidden_layers"),
            vocab_size=self.size("vocab_size"),
            max_position_embeddings=self.size("max_position_embeddings"),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            eos_token_ids=self.eos_token_ids,
            decoder=decoder,
            weight_format=self.weight_format,
        )
