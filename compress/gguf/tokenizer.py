"""tokenizer.json and what lies beside it as the metadata of a GGUF. The way back is checkpoint.gguf.tokenizer.

A GGUF has no rules for splitting a text, only the names of those that llama.cpp knows. Where a tokenizer splits by
rules without a name, the file says GPT-2's, and carries tokenizer.json whole for readers that use it, as the engine
does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from checkpoint.gguf.container import Value
from checkpoint.gguf.tokenizer import WHOLE_TOKENIZER, pre_tokenizer_name
from checkpoint.gguf.vocabulary import TokenType
from compress.errors import CompressError

_UNNAMED = "gpt-2"
_NO_MERGE_SCORE = -1e9  # of a token that no merge makes: it is never preferred


@dataclass(frozen=True, slots=True)
class TokenizerMetadata:
    """What is written, and what a person should know."""

    values: dict[str, Value]
    warning: str = ""


def tokenizer_metadata(directory: Path, vocab_size: int, end_ids: Sequence[int]) -> TokenizerMetadata:
    """vocab_size: rows of the embedding. end_ids: of the tokens that end a stream. Raises CompressError naming what
    cannot be said, and CheckpointError for a file that is not readable."""
    file = directory / "tokenizer.json"
    tokenizer = read_json(file, is_required=True)
    config = read_json(directory / "tokenizer_config.json")
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise CompressError(f"{file}: a tokenizer of type {kind!r} is not supported (supported: BPE)")
    try:
        tokens, types = _vocabulary(tokenizer, vocab_size, file)
        is_sentencepiece = bool(model.get("byte_fallback"))
        values: dict[str, Value] = {"ggml.tokens": list(tokens), "ggml.token_type": [int(kind) for kind in types]}
        values |= _sentencepiece(tokenizer, tokens) if is_sentencepiece else _byte_level(tokenizer)
        values |= _special_ids(tokenizer, config, tokens, end_ids, directory)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CompressError(f"{file}: not a tokenizer as the library tokenizers writes it ({error!r})") from None
    template = _chat_template(directory, config)
    if template:
        values["chat_template"] = template
    warning = ""
    if WHOLE_TOKENIZER in values:
        warning = f"{file}: llama.cpp has no name for how it splits a text, and will split as {_UNNAMED} does"
    return TokenizerMetadata({f"tokenizer.{key}": value for key, value in values.items()}, warning)


def _vocabulary(tokenizer: Mapping[str, Any], vocab_size: int, file: Path) -> tuple[list[str], list[TokenType]]:
    """Text and kind of each row of the embedding."""
    model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
    found = {token_id: (text, _kind(text, model)) for text, token_id in model["vocab"].items()}
    for token in added:
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        is_unknown = token["content"] == model.get("unk_token")
        found[token["id"]] = (token["content"], TokenType.UNKNOWN if is_unknown else kind)
    if found and not 0 <= min(found) <= max(found) < vocab_size:
        raise CompressError(f"{file}: has the token id {max(found)}, and the embedding {vocab_size} rows")
    rows = [found.get(token_id, (f"[PAD{token_id}]", TokenType.UNUSED)) for token_id in range(vocab_size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _kind(text: str, model: Mapping[str, Any]) -> TokenType:
    is_byte = model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def _byte_level(tokenizer: Mapping[str, Any]) -> dict[str, Value]:
    name = pre_tokenizer_name(tokenizer)
    found: dict[str, Value] = {
        "ggml.model": "gpt2",
        "ggml.pre": name or _UNNAMED,
        "ggml.merges": [f"{left} {right}" for left, right in _merges(tokenizer)],
    }
    if name is None:
        found[WHOLE_TOKENIZER] = json.dumps(tokenizer, ensure_ascii=False)
    return found


def _sentencepiece(tokenizer: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Value]:
    """Scores in the order of the merges: llama.cpp joins the pair whose token has the highest."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(tokenizer)):
        ranks.setdefault(left + right, rank)
    steps = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    has_prefix = '"Prepend"' in steps or ('"Metaspace"' in steps and '"prepend_scheme": "never"' not in steps)
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": [-float(ranks[text]) if text in ranks else _NO_MERGE_SCORE for text in tokens],
        "ggml.add_space_prefix": has_prefix,
    }


def _special_ids(
    tokenizer: Mapping[str, Any],
    config: Mapping[str, Any],
    tokens: Sequence[str],
    end_ids: Sequence[int],
    directory: Path,
) -> dict[str, Value]:
    """Ids of tokens with a part, and whether a prompt begins with one."""
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found: dict[str, Value] = {}
    for theirs, ours in names.items():
        said = config.get(theirs)
        text = said.get("content") if isinstance(said, dict) else said
        if text in ids:
            found[f"ggml.{ours}_token_id"] = ids[text]
    bos = read_json(directory / "config.json").get("bos_token_id")
    if type(bos) is int and 0 <= bos < len(tokens):
        found.setdefault("ggml.bos_token_id", bos)
    ends = [end for end in end_ids if end != found.get("ggml.eos_token_id")]
    for name in ("eos", "eot", "eom"):
        if ends and f"ggml.{name}_token_id" not in found:
            found[f"ggml.{name}_token_id"] = ends.pop(0)
    first = _first_token(tokenizer.get("post_processor"))
    if first:
        found["ggml.bos_token_id"] = ids[first]
    return {**found, "ggml.add_bos_token": bool(first)}


def _first_token(post_processor: Mapping[str, Any] | None) -> str:
    """What is put before a prompt; "" where nothing is. Raises CompressError for what a GGUF cannot say."""
    said = post_processor or {}
    if said.get("type") == "Sequence":
        found = [first for part in said["processors"] if (first := _first_token(part))]
        return found[0] if found else ""
    if said.get("type") != "TemplateProcessing":
        return ""
    added = [part["SpecialToken"]["id"] if "SpecialToken" in part else "" for part in said["single"]]
    if added.count("") != 1 or added.index("") != len(added) - 1 or len(added) > 2:
        raise CompressError("tokenizer.json: a GGUF can say that one token is put before a prompt, and no more")
    return str(added[0])


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    try:
        if file.exists():
            return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompressError(f"{file}: not readable ({error})") from None
    said = config.get("chat_template")
    if isinstance(said, list):  # several, of which one is named default
        said = next((each.get("template") for each in said if each.get("name") == "default"), "")
    return said if isinstance(said, str) else ""
