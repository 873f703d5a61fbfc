"""What a model directory says of its model, read and checked. Without torch.

What all models have is here; the rest is its family's, in `decoder`. Knows nothing of engines, devices or families.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from workers.model.cache_spec import CacheSpec
from workers.model.weight_format import WeightFormat

if TYPE_CHECKING:
    from workers.model.layers.decoder import Layer
    from workers.model.layers.source import LayerSource
    from workers.model.tensor_layout import TensorLayout


class Decoder(Protocol):
    """The layers of a model, as its family describes them. A frozen dataclass: its fields are part of what the model
    is, and of what its KV blocks mean.

    `layer` runs on a rank and may import torch. Everything else is asked before anything starts.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """What each layer of the model keeps in the KV cache."""

    def check_split(self, tp: int) -> None:
        """Raise ModelError, naming a field, unless the layers can be cut for so many tensor-parallel ranks. That each
        matrix can be cut is checked by its weight format."""

    def add_tensors(self, layout: TensorLayout, hidden_size: int, index: int) -> None:
        """List the checkpoint's tensors of a layer."""

    def layer(self, source: LayerSource, index: int) -> Layer:
        """A layer on one rank."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a model, under the names of its Hugging Face config.json."""

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    decoder: Decoder
    weight_format: WeightFormat
    embedding_scale: float = 1.0  # multiplies what is embedded
    norm_offset: float = 0.0  # added to the weights of all norms
    logit_scale: float = 1.0  # multiplies the logits
    logit_soft_cap: float = 0.0  # logits become soft_cap * tanh(logit / soft_cap); 0 leaves them

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """What each layer of the model keeps in the KV cache."""
        return self.decoder.cache_specs

    def fingerprint_fields(self) -> dict[str, Any]:
        """All fields, its family's and its weight format's too, as JSON can carry them: what answers and KV blocks
        depend on beside the weights. No family can forget one."""
        fields: dict[str, Any] = described(self)
        return fields


def described(value: Any) -> Any:
    """A dataclass with its type's name, since two types may have the same fields."""
    if dataclasses.is_dataclass(value):
        named = {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **named}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [described(item) for item in value]
    return value
