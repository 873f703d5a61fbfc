"""The keys of config.json that all architectures share; a family (workers.model.families) adds its own.

The names are those of the configuration classes of transformers 4 and 5, and those that its older versions and common
tools have written beside them.
"""

from __future__ import annotations

from checkpoint.keys import Key, KeyTable, harmless, refused, understood

_SIZES = "shape of the weights"
_TRAINING = "used in training only"
_OUTPUTS = "asks transformers for more outputs, not for others"
_NOTE = "a note of the tool that wrote the file"
_ELSEWHERE = "a sampling option of old files; move it to generation_config.json"

COMMON_KEYS: dict[str, Key] = {
    # -- used
    "architectures": understood("chooses the model's code"),
    "model_type": understood("must belong to the architecture"),
    "hidden_size": understood(_SIZES),
    "intermediate_size": understood(_SIZES),
    "num_hidden_layers": understood(_SIZES),
    "num_attention_heads": understood(_SIZES),
    "num_key_value_heads": understood(_SIZES),
    "head_dim": understood(_SIZES),
    "vocab_size": understood(_SIZES),
    "max_position_embeddings": understood("bounds prompt and completion"),
    "rms_norm_eps": understood("of all norms"),
    "rope_theta": understood("base of the rotary frequencies"),
    "rope_scaling": understood("default or llama3; other kinds and their parameters are refused"),
    "rope_parameters": understood("the same, as transformers 5 writes it"),
    "tie_word_embeddings": understood("whether the head is the embedding"),
    "eos_token_id": understood("ends a stream, together with those of the other files"),
    "hidden_act": understood("silu; others are refused"),
    "quantization_config": understood("how the weights are stored; an unknown quant_method is refused"),
    "compression_config": understood("the same, as older files of compressed-tensors call it"),
    # -- not supported
    "qkv_bias": refused("projections have no bias", False),
    "attention_bias": refused("projections have no bias", False),
    "mlp_bias": refused("projections have no bias", False),
    "layer_types": understood("full_attention for every layer; others are refused"),
    "partial_rotary_factor": refused("all of a head is rotated", 1),
    "rope_interleaved": refused("rotated halves lie one behind the other", False),
    "attention_chunk_size": refused("attention sees the whole context"),
    "attn_logit_softcapping": refused("attention scores are not capped"),
    "final_logit_softcapping": refused("logits are not capped"),
    "logits_soft_cap": refused("logits are not capped"),
    "logit_scale": refused("logits are not scaled", 1),
    "auto_map": harmless(
        "code that comes with a checkpoint is never run; the architecture's own is, as in transformers"
    ),
    "is_encoder_decoder": refused("decoders only", False),
    "add_cross_attention": refused("decoders only", False),
    "cross_attention_hidden_size": refused("decoders only"),
    "tie_encoder_decoder": refused("decoders only", False),
    "pruned_heads": refused("all heads are computed", {}),
    # -- changes nothing
    "bos_token_id": harmless("tokenizer.json says what is put before a prompt"),
    "pad_token_id": harmless("nothing is padded"),
    "sep_token_id": harmless("used by encoder-decoders only"),
    "decoder_start_token_id": harmless("used by encoder-decoders only"),
    "is_decoder": harmless("decoders only"),
    "dtype": harmless("model.dtype decides what is computed in; the tensors say what they are stored in"),
    "torch_dtype": harmless("model.dtype decides what is computed in; the tensors say what they are stored in"),
    "use_bfloat16": harmless("model.dtype decides what is computed in"),
    "initializer_range": harmless(_TRAINING),
    "attention_dropout": harmless(_TRAINING),
    "hidden_dropout": harmless(_TRAINING),
    "resid_pdrop": harmless(_TRAINING),
    "gradient_checkpointing": harmless(_TRAINING),
    "pretraining_tp": harmless("how a product was split in training; the sum is the same"),
    "chunk_size_feed_forward": harmless("how transformers splits a product; the sum is the same"),
    "use_cache": harmless("there is always a KV cache"),
    "attn_implementation": harmless("which kernel transformers calls; all compute the same"),
    "_attn_implementation": harmless("which kernel transformers calls; all compute the same"),
    "_attn_implementation_autoset": harmless("which kernel transformers calls; all compute the same"),
    "_attn_implementation_internal": harmless("which kernel transformers calls; all compute the same"),
    "_experts_implementation_internal": harmless("which kernel transformers calls; all compute the same"),
    "_flash_attn_2_enabled": harmless("which kernel transformers calls; all compute the same"),
    "output_attentions": harmless(_OUTPUTS),
    "_output_attentions": harmless(_OUTPUTS),
    "output_hidden_states": harmless(_OUTPUTS),
    "return_dict": harmless(_OUTPUTS),
    "torchscript": harmless(_OUTPUTS),
    "is_llama_config": harmless(_NOTE),
    "transformers.js_config": harmless("for a runtime in web pages"),
    "max_sequence_length": harmless("max_position_embeddings says how long a context is"),
    "id2label": harmless("used by classifiers only"),
    "label2id": harmless("used by classifiers only"),
    "num_labels": harmless("used by classifiers only"),
    "problem_type": harmless("used by classifiers only"),
    "finetuning_task": harmless(_NOTE),
    "task_specific_params": harmless("used by pipelines only"),
    "prefix": harmless("used by pipelines only"),
    "tokenizer_class": harmless("tokenizer.json is read as it is"),
    "transformers_version": harmless(_NOTE),
    "_name_or_path": harmless(_NOTE),
    "name_or_path": harmless(_NOTE),
    "_commit_hash": harmless(_NOTE),
    "_post_init_done": harmless("of transformers' own bookkeeping"),
    "model_name": harmless(_NOTE),
    "unsloth_version": harmless(_NOTE),
    "unsloth_fixed": harmless(_NOTE),
    "tf_legacy_loss": harmless(_TRAINING),
    # -- sampling options that transformers 4 wrote here, with the defaults that ask for nothing
    "max_length": harmless("a limit of transformers' generate(); here max_model_len and the request say it"),
    "min_length": refused(_ELSEWHERE, 0),
    "do_sample": harmless("temperature 0 is how greedy sampling is asked for"),
    "early_stopping": harmless("used by beam search only"),
    "length_penalty": harmless("used by beam search only"),
    "num_beams": refused(_ELSEWHERE, 1),
    "num_beam_groups": refused(_ELSEWHERE, 1),
    "num_return_sequences": refused(_ELSEWHERE, 1),
    "diversity_penalty": refused(_ELSEWHERE, 0),
    "temperature": refused(_ELSEWHERE, 1),
    "top_k": refused(_ELSEWHERE, 50),
    "top_p": refused(_ELSEWHERE, 1),
    "typical_p": refused(_ELSEWHERE, 1),
    "repetition_penalty": refused(_ELSEWHERE, 1),
    "encoder_no_repeat_ngram_size": refused(_ELSEWHERE, 0),
    "no_repeat_ngram_size": refused(_ELSEWHERE, 0),
    "encoder_repetition_penalty": refused(_ELSEWHERE, 1),
    "bad_words_ids": refused(_ELSEWHERE, []),
    "forced_bos_token_id": refused(_ELSEWHERE),
    "forced_eos_token_id": refused(_ELSEWHERE),
    "exponential_decay_length_penalty": refused(_ELSEWHERE),
    "suppress_tokens": refused(_ELSEWHERE, []),
    "begin_suppress_tokens": refused(_ELSEWHERE, []),
    "remove_invalid_values": harmless("logits are finite"),
    "output_scores": harmless(_OUTPUTS),
    "return_dict_in_generate": harmless(_OUTPUTS),
}

ROPE_KEYS: dict[str, KeyTable] = {
    kind: {
        "rope_type": understood("which scaling"),
        "type": understood("which scaling, as older files call it"),
        "rope_theta": understood("base of the rotary frequencies"),
        "partial_rotary_factor": refused("all of a head is rotated", 1),
        **{name: understood("a parameter of the scaling") for name in parameters},
    }
    for kind, parameters in {
        "default": (),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }.items()
}
"""What may stand in rope_scaling and rope_parameters, by rope_type."""
