"""What llama.cpp calls a model's tensors, and how Hugging Face's layout calls them and orders their rows; both ways.

Knows nothing of metadata beyond the architecture and the number of heads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_OF_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([a-z_]+)\.(weight|bias)")

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies; config.json says the same (checkpoint.gguf.rope)."""


@dataclass(frozen=True, slots=True)
class TensorName:
    """A tensor of the file in Hugging Face's layout: one, or one for each expert."""

    name: str
    """With {} for the expert where there are several."""
    is_stacked: bool = False  # the first dimension counts experts
    has_interleaved_heads: bool = False
    """Whether the rows of a head are stored so that those that turn together lie side by side."""

    def of_expert(self, expert: str) -> str:
        """The name of one of several; that of a single one as it is."""
        return self.name.replace("{}", expert) if self.is_stacked else self.name


@dataclass(frozen=True, slots=True)
class FileName:
    """Where a tensor of Hugging Face's layout goes in the file."""

    name: str
    expert: int | None = None  # its place among those that are stacked
    has_interleaved_heads: bool = False  # as in TensorName


_LAYOUT_GLOBAL = {theirs: ours for ours, theirs in _GLOBAL.items()}
_LAYOUT_LAYER = {theirs: ours for ours, theirs in _LAYER.items()}
_LAYOUT_EXPERTS = {theirs: ours for ours, theirs in _EXPERTS.items()}
_LAYOUT_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:mlp\.experts\.(\d+)\.(\w+)|([\w.]+))\.(weight|bias)")


def file_name(name: str, architecture: str) -> FileName | None:
    """The inverse of layout_name; None for a tensor that a GGUF has no name for."""
    if name in _LAYOUT_GLOBAL:
        return FileName(_LAYOUT_GLOBAL[name])
    found = _LAYOUT_OF_LAYER.fullmatch(name)
    if found is None:
        return None
    layer, expert, of_expert, part, kind = found.groups()
    if expert is not None:
        known = kind == "weight" and of_expert in _LAYOUT_EXPERTS
        return FileName(f"blk.{layer}.{_LAYOUT_EXPERTS[of_expert]}.weight", int(expert)) if known else None
    if part not in _LAYOUT_LAYER:
        return None
    turned = _is_turned(architecture, _LAYOUT_LAYER[part])
    return FileName(f"blk.{layer}.{_LAYOUT_LAYER[part]}.{kind}", has_interleaved_heads=turned)


def layout_name(name: str, architecture: str) -> TensorName:
    """Where a tensor goes. One that is not known keeps its name, by which it will be refused."""
    if name in _GLOBAL:
        return TensorName(_GLOBAL[name])
    found = _OF_LAYER.fullmatch(name)
    if found is None:
        return TensorName(name)
    layer, part, kind = found.groups()
    prefix = f"model.layers.{layer}."
    if part in _EXPERTS and kind == "weight":
        return TensorName(f"{prefix}mlp.experts.{{}}.{_EXPERTS[part]}.weight", is_stacked=True)
    if part not in _LAYER:
        return TensorName(name)
    return TensorName(f"{prefix}{_LAYER[part]}.{kind}", has_interleaved_heads=_is_turned(architecture, part))


def _is_turned(architecture: str, part: str) -> bool:
    """llama.cpp turns neighbouring values of Llama's heads, and halves of the others', as Hugging Face does of all."""
    return architecture == "llama" and part in ("attn_q", "attn_k")
