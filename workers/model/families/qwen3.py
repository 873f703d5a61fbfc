"""Qwen 3, dense and with experts: Llama's layers, with queries and keys normed per head."""

from __future__ import annotations

from checkpoint.config_keys import COMMON_KEYS
from checkpoint.keys import Key, harmless, refused, understood
from workers.model.config import ModelConfig
from workers.model.config_fields import ConfigFields
from workers.model.decoder import LayerConfig, PreNormDecoder
from workers.model.family import Family
from workers.model.parts import ExpertsConfig, check_full_attention, read_attention, read_mlp

_KEYS: dict[str, Key] = {
    **COMMON_KEYS,
    "use_sliding_window": refused("attention sees the whole context", False),
    "sliding_window": harmless("without use_sliding_window it has no effect"),
    "max_window_layers": harmless("without use_sliding_window it has no effect"),
    "use_qk_norm": refused("queries and keys are normed", True),
}
_EXPERT_KEYS: dict[str, Key] = {
    **_KEYS,
    "intermediate_size": harmless("every layer has experts"),
    "num_experts": understood("shape of the weights"),
    "num_local_experts": understood("another name of num_experts"),
    "num_experts_per_tok": understood("experts of each token"),
    "moe_intermediate_size": understood("shape of the weights"),
    "norm_topk_prob": understood("whether the chosen experts' weights add up to 1"),
    "decoder_sparse_step": refused("every layer has experts", 1),
    "mlp_only_layers": refused("every layer has experts", []),
    "shared_expert_intermediate_size": refused("there are no shared experts", 0),
    "num_shared_experts": refused("there are no shared experts", 0),
    "output_router_logits": harmless("asks transformers for more outputs, not for others"),
    "router_aux_loss_coef": harmless("used in training only"),
    "router_jitter_noise": harmless("used in training only"),
}


def read(fields: ConfigFields) -> ModelConfig:
    """The dense models. All layers are equal."""
    check_full_attention(fields)
    layer = LayerConfig(read_attention(fields, has_qk_norm=True), read_mlp(fields))
    return fields.model(PreNormDecoder((layer,) * fields.size("num_hidden_layers")))


def read_with_experts(fields: ConfigFields) -> ModelConfig:
    """The models with experts in every layer."""
    check_full_attention(fields)
    fields.only("hidden_act", "silu")
    layer = LayerConfig(read_attention(fields, has_qk_norm=True), _read_experts(fields))
    return fields.model(PreNormDecoder((layer,) * fields.size("num_hidden_layers")))


def _read_experts(fields: ConfigFields) -> ExpertsConfig:
    others = fields.raw.get("num_local_experts")  # as some writers call it
    num_experts, per_token = fields.size("num_experts", others), fields.size("num_experts_per_tok")
    if others not in (None, num_experts):
        raise fields.unsupported(f"num_local_experts={others!r} and num_experts={num_experts} differ")
    if per_token > num_experts:
        raise fields.unsupported(f"num_experts_per_tok is more than num_experts={num_experts}")
    return ExpertsConfig(num_experts, per_token, fields.size("moe_intermediate_size"), fields.flag("norm_topk_prob"))


FAMILIES = (
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        _KEYS,
        read,
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        _EXPERT_KEYS,
        read_with_experts,
        {"max_position_embeddings": 32768, "num_key_value_heads": 4},
    ),
)
