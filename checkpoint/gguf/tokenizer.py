"""tokenizer.json, in the form of the library `tokenizers`, of the vocabulary that a GGUF holds.

A GGUF has tokens and merges, and of the rest a name only: the forms here are those of the models that are so named.
Some carry the whole tokenizer.json as a text besides, as those that we write do where there is no name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.gguf.metadata import Metadata
from checkpoint.gguf.vocabulary import TokenType, Vocabulary

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_SPACE = "\u2581"  # what sentencepiece writes for a space


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, {**_BYTES, "use_regex": False}]


_GPT2: list[dict[str, Any]] = [{**_BYTES, "use_regex": True}]
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": _GPT2,
    "smollm": [{"type": "Digits", "individual_digits": True}, *_GPT2],
    "qwen2": _split(_QWEN2_SPLIT),
    "llama3": _split(_LLAMA3_SPLIT),
    "llama-v3": _split(_LLAMA3_SPLIT),
    "llama-bpe": _split(_LLAMA3_SPLIT),
    "smaug-bpe": _split(_LLAMA3_SPLIT),
}
"""How a text is split before merges, by tokenizer.ggml.pre."""
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe")  # a word that is a token needs no merges; begin with bos
_COMPOSED = ("qwen2",)  # a text is brought to Unicode's NFC
_WRITTEN = ("gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe")
WHOLE_TOKENIZER = "huggingface.json"
"""The key of a whole tokenizer.json, behind `tokenizer.`."""


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """What tokenizer.ggml.pre says of a tokenizer.json of BPE over bytes; None for one that has no name."""
    steps, normalizer = _steps(tokenizer.get("pre_tokenizer")), tokenizer.get("normalizer")
    for name in _WRITTEN:
        is_composed = isinstance(normalizer, dict) and normalizer.get("type") == "NFC"
        has_whole_words = bool(tokenizer["model"].get("ignore_merges"))
        is_same = _steps({"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[name]}) == steps
        if is_same and is_composed == (name in _COMPOSED) and has_whole_words == (name in _WHOLE_WORDS):
            return name if is_composed or not normalizer else None
    return None


def _steps(pre_tokenizer: Any) -> list[tuple[object, ...]]:
    """What a pre_tokenizer does, whatever the form in which it is said."""
    said = pre_tokenizer if isinstance(pre_tokenizer, dict) else {}
    if said.get("type") == "Sequence":
        return [step for part in said.get("pretokenizers", ()) for step in _steps(part)]
    if said.get("type") == "ByteLevel":
        return [("bytes", bool(said.get("add_prefix_space")), said.get("use_regex", True))]
    if said.get("type") == "Split":
        pattern = said.get("pattern") or {}
        return [("split", pattern.get("Regex"), str(said.get("behavior")).lower(), bool(said.get("invert")))]
    return [(said.get("type"), bool(said.get("individual_digits")))]


def tokenizer_json(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    """The whole file. Raises CheckpointError for a kind of tokenizer that is not known."""
    if f"tokenizer.{WHOLE_TOKENIZER}" in metadata.values:
        return _whole(metadata, vocabulary)
    model = metadata.text("tokenizer.ggml.model")
    if model == "gpt2":
        return _byte_level(metadata, vocabulary)
    if model == "llama":
        return _sentencepiece(metadata, vocabulary)
    raise metadata.refuse(f"tokenizer.ggml.model={model!r} is not supported (supported: gpt2, llama)")


def _whole(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    """The text that the file carries, if its tokens are those of the other keys."""
    key = f"tokenizer.{WHOLE_TOKENIZER}"
    try:
        tokenizer = json.loads(metadata.text(key))
        found = {token_id: text for text, token_id in tokenizer["model"]["vocab"].items()}
        found |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
        is_same = all(vocabulary.tokens[token_id] == text for token_id, text in found.items() if token_id >= 0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise metadata.refuse(f"{key} is not a tokenizer.json with the tokens of tokenizer.ggml.tokens") from None
    if not is_same:
        raise metadata.refuse(f"{key} has other tokens than tokenizer.ggml.tokens")
    return dict(tokenizer)


def _byte_level(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    """BPE over bytes, each written as a letter, as GPT-2 began it."""
    name = metadata.text("tokenizer.ggml.pre")
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise metadata.refuse(f"tokenizer.ggml.pre={name!r} is not supported (supported: {known})")
    has_whole_words = name in _WHOLE_WORDS
    model = _bpe(vocabulary, _merges(metadata, vocabulary), ignore_merges=has_whole_words)
    return {
        **_frame(vocabulary),
        "normalizer": {"type": "NFC"} if name in _COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[name]},
        "post_processor": _post_processor(metadata, vocabulary, has_whole_words, [{**_BYTES, "use_regex": True}]),
        "decoder": {**_BYTES, "use_regex": True},
        "model": model,
    }


def _sentencepiece(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    """BPE over characters, with bytes for those that the vocabulary lacks, as Llama 2 has it."""
    begins_with_space = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    merges = _merges(metadata, vocabulary) if "tokenizer.ggml.merges" in metadata.values else None
    if merges is None:
        scores = metadata.numbers("tokenizer.ggml.scores", len(vocabulary.tokens))
        if scores is None:
            raise metadata.wrong("tokenizer.ggml.scores", "a list of numbers")
        merges = scored_merges(vocabulary, scores)
    unknown = None if vocabulary.unknown_id is None else vocabulary.tokens[vocabulary.unknown_id]
    model = _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if begins_with_space else []
    strip: list[dict[str, Any]] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoders = [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        **_frame(vocabulary),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, _replace(" ", _SPACE)]},
        "pre_tokenizer": None,
        "post_processor": _post_processor(metadata, vocabulary, True, []),
        "decoder": {"type": "Sequence", "decoders": decoders + (strip if begins_with_space else [])},
        "model": model,
    }


def _frame(vocabulary: Vocabulary) -> dict[str, Any]:
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added_tokens()}


def _bpe(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], **options: object) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": {text: token_id for token_id, text in enumerate(vocabulary.tokens)},
        "merges": [list(merge) for merge in merges],
    }


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _merges(metadata: Metadata, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Those of the file; each must give a token, as the library wants it."""
    known, found = set(vocabulary.tokens), []
    for merge in metadata.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not right or not {left, right, left + right} <= known:
            raise metadata.refuse(f"tokenizer.ggml.merges: {merge[:60]!r} does not make a token of two")
        found.append((left, right))
    return found


def scored_merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary stands for: each pair of tokens that makes a third, best score first.

    In the order in which transformers' conversion has them, so that one text gives the same tokens.
    """
    ids = {
        text: token_id
        for token_id, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNDEFINED)
    }
    found: list[tuple[float, str, str]] = []
    for text, token_id in ids.items():
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = [(left, right) for left, right in halves if left in ids and right in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(scores[token_id], left, right) for left, right in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _post_processor(
    metadata: Metadata, vocabulary: Vocabulary, adds_bos: bool, before: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Puts the beginning-of-text token before a prompt, where the file or else the kind of tokenizer says so."""
    processors = list(before)
    if metadata.flag("tokenizer.ggml.add_bos_token", adds_bos and vocabulary.bos_id is not None):
        if vocabulary.bos_id is None:
            raise metadata.refuse("tokenizer.ggml.add_bos_token: there is no tokenizer.ggml.bos_token_id")
        bos = vocabulary.tokens[vocabulary.bos_id]
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        one, other = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
        processors.append(
            {
                "type": "TemplateProcessing",
                "single": [first, one],
                "pair": [first, one, {"SpecialToken": {"id": bos, "type_id": 1}}, other],
                "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
            }
        )
    if len(processors) > 1:
        return {"type": "Sequence", "processors": processors}
    return processors[0] if processors else None
