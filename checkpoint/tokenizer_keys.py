"""The keys of the tokenizer's files: tokenizer_config.json, special_tokens_map.json and the top of tokenizer.json.

tokenizer.json is the tokenizer: the others repeat parts of it for transformers' classes, and may only repeat.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json
from checkpoint.keys import KeyTable, check_keys, harmless, refused, understood

_CLASS = "for transformers' tokenizer classes; tokenizer.json is read as it is"
_REPEATED = "tokenizer.json says it"
_BATCHES = "used for batches that are padded or cut"
_SPECIAL = "a name for a chat template"
_NOTE = "a note of the tool that wrote the file"

TOKENIZER_CONFIG_KEYS: KeyTable = {
    "chat_template": understood("chat messages to a prompt"),
    "bos_token": understood(_SPECIAL),
    "eos_token": understood("ends a stream, together with those of the other files; " + _SPECIAL),
    "added_tokens_decoder": understood("must repeat tokenizer.json"),
    "split_special_tokens": refused("special tokens in a text are special", False),
    "fix_mistral_regex": refused("tokenizer.json is read as it is", False),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": refused("text is not cleaned up", False),
    "clean_up_tokenization_spaces": harmless("transformers ignores it for BPE, and text is shown as it was generated"),
    "additional_special_tokens": understood("must be special tokens of tokenizer.json"),
    "extra_special_tokens": understood("must be special tokens of tokenizer.json"),
    "model_specific_special_tokens": harmless(_REPEATED),
    "add_bos_token": harmless(_REPEATED),
    "add_eos_token": harmless(_REPEATED),
    "add_prefix_space": harmless(_REPEATED),
    "do_lower_case": harmless(_REPEATED),
    "trim_offsets": harmless("used for offsets, which are not needed"),
    "tokenizer_class": harmless(_CLASS),
    "tokenizer_type": harmless(_CLASS),
    "tokenizer_file": harmless(_CLASS),
    "vocab_file": harmless(_CLASS),
    "auto_map": harmless("code that comes with a checkpoint is never run; tokenizer.json is read as it is"),
    "backend": harmless(_CLASS),
    "use_fast": harmless(_CLASS),
    "from_slow": harmless(_CLASS),
    "legacy": harmless(_CLASS),
    "legacy_behaviour": harmless(_CLASS),
    "sp_model_kwargs": harmless(_CLASS),
    "errors": harmless("bytes that are no text show as U+FFFD"),
    "spaces_between_special_tokens": harmless("used by tokenizers without a tokenizer.json"),
    "use_default_system_prompt": harmless("only the chat template adds to a conversation"),
    "vocab_size": harmless("config.json says how many ids there are"),
    "model_max_length": harmless("config.json says how long a context is"),
    "max_length": harmless(_BATCHES),
    "max_len": harmless(_BATCHES),
    "stride": harmless(_BATCHES),
    "pad_to_multiple_of": harmless(_BATCHES),
    "padding": harmless(_BATCHES),
    "padding_side": harmless(_BATCHES),
    "truncation": harmless(_BATCHES),
    "truncation_side": harmless(_BATCHES),
    "truncation_strategy": harmless(_BATCHES),
    "model_input_names": harmless(_BATCHES),
    "return_token_type_ids": harmless(_BATCHES),
    "pad_token_type_id": harmless(_BATCHES),
    "processor_class": harmless("used by models that see or hear"),
    "response_schema": harmless("used by clients that parse answers"),
    "response_template": harmless("used by clients that parse answers"),
    "chat_control_tokens": harmless("used by clients that clean up messages"),
    "name_or_path": harmless(_NOTE),
    "special_tokens_map_file": harmless(_NOTE),
    "files_loaded": harmless(_NOTE),
    "init_inputs": refused("tokenizer.json is read as it is", []),
    "is_local": harmless(_NOTE),
    "local_files_only": harmless(_NOTE),
    "verbose": harmless(_NOTE),
    "device_map": harmless(_NOTE),
    "transformers_version": harmless(_NOTE),
    "unsloth_version": harmless(_NOTE),
}
"""Besides, every key that ends in _token with a text is understood, as a name for a chat template."""

TOKENIZER_KEYS: KeyTable = {
    "version": understood("of the format"),
    "added_tokens": understood("special and other tokens beside the vocabulary"),
    "normalizer": understood("by the tokenizers library"),
    "pre_tokenizer": understood("by the tokenizers library"),
    "model": understood("by the tokenizers library"),
    "post_processor": understood("by the tokenizers library"),
    "decoder": understood("by the tokenizers library"),
    "truncation": harmless("switched off: no prompt is cut"),
    "padding": harmless("switched off: nothing is padded"),
}

_NOT_THE_SAME = "not the same in tokenizer.json (which counts with added_tokens_decoder in model.ignore_keys)"
_TOKEN_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def check_tokenizer_files(directory: Path, ignored: Collection[str] = ()) -> None:
    """Raise CheckpointError unless all that the tokenizer's files say is known, and none contradicts tokenizer.json."""
    path = directory / "tokenizer.json"
    tokenizer = read_json(path, is_required=True)
    check_keys({key: value for key, value in tokenizer.items() if key not in ignored}, TOKENIZER_KEYS, path)
    known = _known_tokens(tokenizer)
    special = {token["content"] for token in _added_tokens(tokenizer) if token.get("special")}
    for path in (directory / "tokenizer_config.json", directory / "special_tokens_map.json"):
        config = read_json(path, ignored=ignored)
        check_keys(_without_names(config), TOKENIZER_CONFIG_KEYS, path)
        _check_added_tokens(config.get("added_tokens_decoder"), tokenizer, path)
        for name in ("bos_token", "eos_token"):
            _check_token(config.get(name), known, f"{path}: {name}", "is not in tokenizer.json")
        for name in ("additional_special_tokens", "extra_special_tokens"):
            listed = config.get(name) or []
            for token in listed.values() if isinstance(listed, dict) else listed:
                _check_token(token, special, f"{path}: {name}", "is no special token of tokenizer.json")


def token_text(value: object) -> str:
    """The text of a special token, which stands there as it is or in an object; "" when there is none."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _without_names(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys that are not just names of special tokens."""
    return {key: value for key, value in raw.items() if not (key.endswith("_token") and token_text(value))}


def _check_token(value: object, known: set[str], where: str, complaint: str) -> None:
    token = token_text(value)
    if token and token not in known:
        raise CheckpointError(f"{where}: {token!r} {complaint}")


def _added_tokens(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    added = tokenizer.get("added_tokens") or []
    return [token for token in added if isinstance(token, dict) and isinstance(token.get("content"), str)]


def _known_tokens(tokenizer: dict[str, Any]) -> set[str]:
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    # Unigram's is a list of [token, score].
    listed = [entry[0] for entry in vocab if entry] if isinstance(vocab, list) else list(vocab or ())
    return {token["content"] for token in _added_tokens(tokenizer)} | set(listed)


def _check_added_tokens(decoder: object, tokenizer: dict[str, Any], path: Path) -> None:
    """transformers lets added_tokens_decoder change tokenizer.json; where it would, the files contradict each other."""
    if decoder is None:
        return
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder: must be an object")
    added = {str(token.get("id")): token for token in _added_tokens(tokenizer)}
    for token_id, token in decoder.items():
        known = added.get(token_id)
        if not isinstance(token, dict) or known is None or known.get("content") != token.get("content"):
            raise CheckpointError(f"{path}: added_tokens_decoder.{token_id}: {_NOT_THE_SAME}")
        for flag in _TOKEN_FLAGS:
            if bool(token.get(flag)) != bool(known.get(flag)):
                raise CheckpointError(f"{path}: added_tokens_decoder.{token_id}.{flag}: {_NOT_THE_SAME}")
