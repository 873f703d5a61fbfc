"""What becomes of the keys of a GGUF's metadata: of the architecture's and of the tokenizer's. Others are notes."""

from __future__ import annotations

from checkpoint.keys import KeyTable, harmless, refused, understood

_SIZES = "shape of the weights"
_NOTE = "a note of the tool that wrote the file"
_INFILLING = "a token for infilling, which a prompt may use as any other"
_NO_EXPERTS = "this architecture has no experts here"
_NONE_SHARED = "there are no shared experts"
_EMBEDDING_MODELS = "used by embedding models only"

_ARCHITECTURE: KeyTable = {
    "vocab_size": understood("must be that of the embedding"),
    "context_length": understood("bounds prompt and completion"),
    "embedding_length": understood(_SIZES),
    "block_count": understood(_SIZES),
    "feed_forward_length": understood(_SIZES),
    "attention.head_count": understood(_SIZES),
    "attention.head_count_kv": understood(_SIZES),
    "attention.key_length": understood(_SIZES),
    "attention.value_length": understood("must be that of the keys"),
    "attention.layer_norm_rms_epsilon": understood("of all norms"),
    "attention.sliding_window": refused("attention sees the whole context", 0),
    "attention.causal": refused("attention sees what came before only", True),
    "attention.scale": refused("scores are divided by the root of the head's size", 0),
    "attention.clamp_kqv": refused("queries, keys and values are not clamped", 0),
    "attention.max_alibi_bias": refused("positions are rotated", 0),
    "rope.dimension_count": understood("must be the head's size: all of a head is rotated"),
    "rope.freq_base": understood("base of the rotary frequencies"),
    "rope.scaling.type": refused("of scalings there is Llama 3's, which rope_freqs.weight says", "none"),
    "rope.scaling.factor": refused("of scalings there is Llama 3's, which rope_freqs.weight says", 1, 0),
    "rope.scaling.attn_factor": refused("of scalings there is Llama 3's, which rope_freqs.weight says", 1, 0),
    "rope.scaling.original_context_length": harmless("used by scalings that are refused"),
    "rope.scaling.finetuned": harmless("used by scalings that are refused"),
    "rope.scale_linear": refused("of scalings there is Llama 3's, which rope_freqs.weight says", 1, 0),
    "tensor_data_layout": harmless(_NOTE),
    "use_parallel_residual": refused("attention and MLP follow each other", False),
    "logit_scale": refused("logits are not scaled", 1, 0),
    "residual_scale": refused("the residual stream is not scaled", 1, 0),
    "embedding_scale": refused("embeddings are not scaled", 1, 0),
    "final_logit_softcapping": refused("logits are not capped", 0),
    "attn_logit_softcapping": refused("attention scores are not capped", 0),
    "pooling_type": harmless(_EMBEDDING_MODELS),
}

ARCHITECTURE_KEYS: dict[str, KeyTable] = {
    "llama": {
        **_ARCHITECTURE,
        "expert_count": refused(_NO_EXPERTS, 0),
        "expert_used_count": refused(_NO_EXPERTS, 0),
    },
    "qwen3": _ARCHITECTURE,
    "qwen3moe": {
        **_ARCHITECTURE,
        "expert_count": understood(_SIZES),
        "expert_used_count": understood("experts of each token"),
        "expert_feed_forward_length": understood(_SIZES),
        "expert_shared_count": refused(_NONE_SHARED, 0),
        "expert_shared_feed_forward_length": refused(_NONE_SHARED, 0),
        "expert_weights_scale": refused("the experts' weights are not scaled", 1, 0),
        "expert_weights_norm": refused("the chosen experts' weights add up to 1", True),
        "expert_gating_func": refused("the router is a softmax", 1, 0),
        "expert_group_count": refused("experts have no groups", 0, 1),
        "expert_group_used_count": refused("experts have no groups", 0, 1),
        "decoder_sparse_step": refused("every layer has experts", 1),
    },
}
"""By general.architecture, without its prefix."""

TOKENIZER_KEYS: KeyTable = {
    "ggml.model": understood("gpt2 or llama; others are refused"),
    "ggml.pre": understood("how text is split before the merges"),
    "ggml.tokens": understood("the vocabulary"),
    "ggml.token_type": understood("which tokens are special"),
    "ggml.scores": understood("order of the merges of a sentencepiece vocabulary"),
    "ggml.merges": understood("the merges"),
    "ggml.bos_token_id": understood("put before a prompt, if add_bos_token says so; a name for a chat template"),
    "ggml.eos_token_id": understood("ends a stream; a name for a chat template"),
    "ggml.eot_token_id": understood("ends a stream"),
    "ggml.eom_token_id": understood("ends a stream"),
    "ggml.unknown_token_id": understood("stands for what the vocabulary lacks; a name for a chat template"),
    "ggml.padding_token_id": understood("a name for a chat template"),
    "ggml.add_bos_token": understood("whether a prompt begins with it"),
    "ggml.add_eos_token": refused("a prompt does not end with it", False),
    "ggml.add_sep_token": refused("a prompt does not end with it", False),
    "ggml.add_space_prefix": understood("whether a text begins with a space"),
    "ggml.remove_extra_whitespaces": refused("texts are taken as they are", False),
    "ggml.precompiled_charsmap": refused("texts are taken as they are"),
    "ggml.token_type_count": harmless(_EMBEDDING_MODELS),
    "ggml.seperator_token_id": harmless("used by encoders only"),
    "ggml.separator_token_id": harmless("used by encoders only"),
    "ggml.cls_token_id": harmless("used by encoders only"),
    "ggml.mask_token_id": harmless("used by encoders only"),
    "ggml.prefix_token_id": harmless(_INFILLING),
    "ggml.suffix_token_id": harmless(_INFILLING),
    "ggml.middle_token_id": harmless(_INFILLING),
    "ggml.fim_pre_token_id": harmless(_INFILLING),
    "ggml.fim_suf_token_id": harmless(_INFILLING),
    "ggml.fim_mid_token_id": harmless(_INFILLING),
    "ggml.fim_pad_token_id": harmless(_INFILLING),
    "ggml.fim_rep_token_id": harmless(_INFILLING),
    "ggml.fim_sep_token_id": harmless(_INFILLING),
    "chat_template": understood("chat messages to a prompt"),
    "chat_templates": harmless("names of further templates; the one without a name is used"),
    "huggingface.json": understood("the whole tokenizer, whose tokens must be those of the other keys"),
    "rwkv.world": harmless("the other keys say the same"),
}
"""Without the prefix `tokenizer.`. Besides, chat_template.NAME are further templates."""

SAMPLING_KEYS: dict[str, str] = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""What `general.sampling` recommends, and its names in generation_config.json. Others are for llama.cpp's samplers."""
