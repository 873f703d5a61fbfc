"""The parts of decoder layers, each as a few sizes and options, and how config.json says them. Without torch.

A family composes its layers of these, or of its own. The layers that compute them are in workers.model.layers. Knows
nothing of families.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from checkpoint.config_keys import ROPE_KEYS
from checkpoint.errors import CheckpointError
from checkpoint.keys import check_keys
from workers.errors import ModelError
from workers.model.cache_spec import CacheSpec
from workers.model.config_fields import ConfigFields
from workers.model.weight_format import ExpertMatrices, Matrices, Split


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies (arXiv:2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How queries and keys turn with their positions (arXiv:2104.09864)."""

    rope_theta: float
    rope_scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Grouped-query attention with rotary positions, and what may be added to it."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig
    has_qk_norm: bool = False  # queries and keys are normed per head before they turn
    has_bias: bool = False  # of the projections to queries, keys and values
    has_output_bias: bool = False
    window: int = 0  # tokens that a query sees, itself included; 0: all before it
    has_sinks: bool = False  # a logit of each head that takes weight and brings no value
    soft_cap: float = 0.0  # scores become soft_cap * tanh(score / soft_cap); 0 leaves them
    scale: float = 0.0  # of the scores; 0: head_dim ** -0.5

    @property
    def cache_spec(self) -> CacheSpec:
        """What a layer keeps."""
        return CacheSpec(self.num_key_value_heads, self.head_dim, self.window)

    def check_split(self, tp: int) -> None:
        """Each rank has whole heads."""
        _check_divides(tp, self, "num_attention_heads", "num_key_value_heads")

    def qkv(self, prefix: str, hidden: int) -> Matrices:
        """The projections to queries, keys and values."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        names = (prefix + "q_proj", prefix + "k_proj", prefix + "v_proj")
        return Matrices(names, (queries, keys, keys), hidden, Split.OUTPUTS, self.has_bias)

    def output(self, prefix: str, hidden: int) -> Matrices:
        """The projection back."""
        queries = self.num_attention_heads * self.head_dim
        return Matrices((prefix + "o_proj",), (hidden,), queries, Split.INPUTS, self.has_output_bias)


def kv_scale_names(prefix: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the scales of an fp8 cache, of keys and of values: compressed-tensors', then ModelOpt's."""
    keys, values = ((f"{prefix}{kind}_scale", f"{prefix}{kind}_proj.{kind}_scale") for kind in "kv")
    return keys, values


def kv_channel_names(prefix: str) -> tuple[str, ...]:
    """Names of what stands for each channel of a cache that packs numbers by it: of keys and of values the scales, then
    the shifts. Each is [kv_heads, head_dim]; `switchyard quantize` writes them."""
    return tuple(f"{prefix}{kind}_channel_{part}" for kind in "kv" for part in ("scale", "shift"))


@dataclass(frozen=True, slots=True)
class MlpConfig:
    """down(silu(gate(x)) * up(x))."""

    intermediate_size: int

    def check_split(self, tp: int) -> None:
        """Each rank has its share of the width."""
        _check_divides(tp, self, "intermediate_size")

    def gate_up(self, prefix: str, hidden: int) -> Matrices:
        """The projections to the width."""
        sizes = (self.intermediate_size, self.intermediate_size)
        return Matrices((prefix + "gate_proj", prefix + "up_proj"), sizes, hidden, Split.OUTPUTS)

    def down(self, prefix: str, hidden: int) -> Matrices:
        """The projection back."""
        return Matrices((prefix + "down_proj",), (hidden,), self.intermediate_size, Split.INPUTS)


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts in place of an MLP; each expert is one."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False  # the chosen experts' weights add up to 1
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of an expert's matrices

    def check_split(self, tp: int) -> None:
        """Each rank has its share of every expert's width."""
        _check_divides(tp, self, "moe_intermediate_size")

    def matrices(self, prefix: str, hidden: int) -> ExpertMatrices:
        """Those of all experts."""
        gates, ups, downs = (
            tuple(f"{prefix}experts.{expert}.{name}" for expert in range(self.num_experts)) for name in self.names
        )
        return ExpertMatrices(gates, ups, downs, hidden, self.moe_intermediate_size)


def _check_divides(tp: int, part: object, *fields: str) -> None:
    for field in fields:
        if getattr(part, field) % tp:
            raise ModelError(f"tp={tp} does not divide {field}={getattr(part, field)}")


def read_attention(fields: ConfigFields, **options: Any) -> AttentionConfig:
    """Sizes and rotation under their usual names. options: further fields of AttentionConfig."""
    heads = fields.size("num_attention_heads")
    return AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", fields.size("hidden_size") // heads),
        rope=read_rope(fields),
        **options,
    )


def check_full_attention(fields: ConfigFields) -> None:
    """Refuse layer_types that name any other attention."""
    layer_types = fields.raw.get("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list) or set(layer_types) - {"full_attention"}):
        raise fields.unsupported(f"layer_types: only full_attention is supported, not {layer_types!r}")


def read_mlp(fields: ConfigFields) -> MlpConfig:
    """The usual MLP, which knows one activation."""
    fields.only("hidden_act", "silu")
    return MlpConfig(fields.size("intermediate_size"))


def read_rope(fields: ConfigFields) -> RopeConfig:
    """What rope_theta, rope_scaling and rope_parameters say together."""
    said, kind = _merge_rope(fields)
    theta = fields.number("rope_theta", fields.number("rope_theta", 10000.0), said)
    if kind == "default":
        return RopeConfig(theta)
    for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if said.get(name) is None:
            raise fields.unsupported(f"rope scaling llama3 lacks {name}")
    scaling = RopeScaling(
        factor=fields.number("factor", 0, said),
        low_freq_factor=fields.number("low_freq_factor", 0, said),
        high_freq_factor=fields.number("high_freq_factor", 0, said),
        original_max_position_embeddings=int(fields.number("original_max_position_embeddings", 0, said)),
    )
    return RopeConfig(theta, scaling)


def _merge_rope(fields: ConfigFields) -> tuple[dict[str, Any], str]:
    """The keys of rope_scaling and rope_parameters, which must agree, and the kind of scaling."""
    merged: dict[str, Any] = {}
    kind = "default"
    for name in ("rope_scaling", "rope_parameters"):
        part = fields.raw.get(name)
        if not isinstance(part, dict | None):
            raise fields.wrong(name, "an object", part)
        if not part:
            continue
        said = part.get("rope_type") or part.get("type") or "default"
        if said not in ROPE_KEYS:
            known = ", ".join(sorted(ROPE_KEYS))
            raise fields.unsupported(f"{name}: rope scaling {said!r} is not supported (supported: {known})")
        try:
            check_keys(part, ROPE_KEYS[said], f"{fields.path}: {name}")
        except CheckpointError as error:
            raise ModelError(str(error)) from None
        if any(merged.get(key, value) != value for key, value in part.items()):
            raise fields.unsupported("rope_scaling and rope_parameters contradict each other")
        merged, kind = {**merged, **part}, said
    return merged, kind
