"""Who makes the inputs of a product, so that a factor for each of its columns can be folded in there.

Known are decoders of the usual form (workers.model.decoder) without experts: a norm before the projections, the MLP's
up projection before its down projection, and the values before the output projection where each query head has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError
from workers.model.config import ModelConfig
from workers.model.decoder import PreNormDecoder
from workers.model.parts import MlpConfig
from workers.model.weight_format import Matrices


@dataclass(frozen=True, slots=True)
class Fold:
    """A producer's rows, or a norm's weights, become smaller, and the consumer's columns larger."""

    producer: str  # of a norm the whole name, of a matrix the name without its last part
    is_norm: bool
    consumer: Matrices


def folds_of(model: ModelConfig, matrices: Sequence[Matrices], index: int) -> list[Fold]:
    """Of a layer. Raises CompressError for a family of another form."""
    if not isinstance(model.decoder, PreNormDecoder):
        raise CompressError(f"{model.architecture}: its layers have no norms that factors are known to fold into")
    layer, prefix = model.decoder.layers[index], f"model.layers.{index}."
    by_first = {group.names[0]: group for group in matrices}
    attention, folds = layer.attention, []
    folds.append(Fold(prefix + "input_layernorm.weight", True, by_first[prefix + "self_attn.q_proj"]))
    if attention.num_key_value_heads == attention.num_attention_heads and not attention.has_bias:
        folds.append(Fold(prefix + "self_attn.v_proj", False, by_first[prefix + "self_attn.o_proj"]))
    if isinstance(layer.mlp, MlpConfig):
        folds.append(Fold(prefix + "post_attention_layernorm.weight", True, by_first[prefix + "mlp.gate_proj"]))
        folds.append(Fold(prefix + "mlp.up_proj", False, by_first[prefix + "mlp.down_proj"]))
    return folds


def fold_into(
    model: ModelConfig, fold: Fold, weights: dict[str, Tensor], others: dict[str, Tensor], factors: Tensor
) -> Tensor:
    """Divide the producer's outputs; returns the factors as they became when a norm's weights were rounded."""
    if not fold.is_norm:
        weights[fold.producer] = weights[fold.producer] / factors[:, None]
        return factors
    stored, offset = others[fold.producer], model.norm_offset
    before = stored.float() + offset
    after = (before / factors - offset).to(stored.dtype)
    is_usable = (before != 0) & ((after.float() + offset) != 0)
    after = torch.where(is_usable, after, stored)
    others[fold.producer] = after
    return torch.where(is_usable, before / (after.float() + offset), torch.ones_like(factors))
