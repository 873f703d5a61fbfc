"""What a family of models says of itself. Without torch. Knows nothing of any particular family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from checkpoint.keys import KeyTable
from workers.model.config import ModelConfig
from workers.model.config_fields import ConfigFields


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one architecture, as their config.json names it.

    A module with FAMILIES, a tuple of these, can be named in `model.plugins`.
    """

    architecture: str
    model_type: str  # that belongs to it
    keys: KeyTable = field(repr=False)  # what becomes of each key of config.json
    read: Callable[[ConfigFields], ModelConfig] = field(repr=False)  # raises ModelError
    defaults: Mapping[str, int] = field(default_factory=dict)
    """What transformers takes for a key that config.json lacks. One that is null is derived from the others."""
