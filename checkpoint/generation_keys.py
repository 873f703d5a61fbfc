"""The keys of generation_config.json."""

from __future__ import annotations

from checkpoint.keys import KeyTable, harmless, refused, understood

_BEAMS = "beam search is not served"
_ASSISTED = "how transformers speculates; the tokens are the same"
_OUTPUTS = "asks transformers for more outputs, not for others"
_INNER = "how transformers computes, not what"
_BANS = "tokens are banned by requests only, and none is forced"
_SHAPES = "the distribution is not shaped this way"

_EXACT_CACHES = ("dynamic", "dynamic_full", "static", "hybrid", "offloaded", "offloaded_static")

GENERATION_KEYS: KeyTable = {
    "eos_token_id": understood("ends a stream, together with those of the other files"),
    "temperature": understood("default of requests"),
    "top_p": understood("default of requests"),
    "top_k": understood("default of requests"),
    "max_new_tokens": understood("default limit of chats"),
    "do_sample": harmless("temperature 0 is how greedy sampling is asked for"),
    "bos_token_id": harmless("tokenizer.json says what is put before a prompt"),
    "pad_token_id": harmless("nothing is padded"),
    "decoder_start_token_id": harmless("used by encoder-decoders only"),
    "encoder_repetition_penalty": refused("the prompt's tokens are not made likelier", 1),
    "encoder_no_repeat_ngram_size": refused("n-grams may repeat", 0),
    "max_length": harmless("a limit of transformers' generate(); here max_model_len and the request say it"),
    "max_time": refused("a stream's time is bounded by the request's deadline"),
    "min_length": refused("a stream may end at any length", 0),
    "min_new_tokens": refused("a stream may end at any length", 0),
    "stop_strings": refused("stop texts come with a request", []),
    "min_p": understood("default of requests"),
    "top_h": refused(_SHAPES),
    "typical_p": understood("default of requests; applied before top_k and top_p, in transformers after them"),
    "epsilon_cutoff": refused(_SHAPES, 0),
    "eta_cutoff": refused(_SHAPES, 0),
    "repetition_penalty": understood("default of requests"),
    "no_repeat_ngram_size": refused("n-grams may repeat", 0),
    "exponential_decay_length_penalty": refused("end tokens do not become likelier"),
    "bad_words_ids": refused(_BANS, []),
    "forced_bos_token_id": refused(_BANS),
    "forced_eos_token_id": refused(_BANS),
    "suppress_tokens": refused(_BANS, []),
    "begin_suppress_tokens": refused(_BANS, []),
    "sequence_bias": refused(_BANS, []),
    "constraints": refused(_BANS, []),
    "force_words_ids": refused(_BANS, []),
    "guidance_scale": refused("there is no guidance", 1),
    "watermarking_config": refused("there is no watermark"),
    "penalty_alpha": refused("there is no contrastive search", 0),
    "dola_layers": refused("there is no contrastive decoding"),
    "token_healing": refused("prompts are taken as they are", False),
    "num_beams": refused(_BEAMS, 1),
    "num_beam_groups": refused(_BEAMS, 1),
    "num_return_sequences": refused("a request asks for one completion", 1),
    "diversity_penalty": refused(_BEAMS, 0),
    "early_stopping": harmless(_BEAMS),
    "length_penalty": harmless(_BEAMS),
    "renormalize_logits": harmless("a softmax follows"),
    "remove_invalid_values": harmless("logits are finite"),
    "use_cache": harmless("there is always a KV cache"),
    "cache_implementation": refused(
        "the KV cache keeps every bit unless kvstore.kv_cache_dtype or kv_encoding says otherwise", *_EXACT_CACHES
    ),
    "cache_config": refused(
        "the KV cache keeps every bit unless kvstore.kv_cache_dtype or kv_encoding says otherwise", {}
    ),
    "max_cache_len": harmless(_INNER),
    "compile_config": harmless(_INNER),
    "disable_compile": harmless(_INNER),
    "continuous_batching_config": harmless(_INNER),
    "low_memory": harmless(_INNER),
    "prefill_chunk_size": harmless(_INNER),
    "use_mtp": harmless(_ASSISTED),
    "speculation_type": harmless(_ASSISTED),
    "is_assistant": harmless(_ASSISTED),
    "num_assistant_tokens": harmless(_ASSISTED),
    "num_assistant_tokens_schedule": harmless(_ASSISTED),
    "assistant_confidence_threshold": harmless(_ASSISTED),
    "assistant_early_exit": harmless(_ASSISTED),
    "assistant_ensemble_weight": harmless(_ASSISTED),
    "assistant_lookbehind": harmless(_ASSISTED),
    "target_lookbehind": harmless(_ASSISTED),
    "prompt_lookup_num_tokens": harmless(_ASSISTED),
    "max_matching_ngram_size": harmless(_ASSISTED),
    "output_attentions": harmless(_OUTPUTS),
    "output_hidden_states": harmless(_OUTPUTS),
    "output_scores": harmless(_OUTPUTS),
    "output_logits": harmless(_OUTPUTS),
    "return_dict_in_generate": harmless(_OUTPUTS),
    "transformers_version": harmless("a note of the tool that wrote the file"),
    "_from_model_config": harmless("a note of the tool that wrote the file"),
}
"""Sampling options count unless model.generation_config is none; eos_token_id always does."""
