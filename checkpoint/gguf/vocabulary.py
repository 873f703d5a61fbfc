"""The tokens of a GGUF: texts, kinds, and which of them begin and end a text. Knows nothing of how text is cut."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

from checkpoint.gguf.metadata import Metadata


class TokenType(IntEnum):
    """As tokenizer.ggml.token_type counts them."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_MOST_CHARACTERS = 1024  # of a token; merges are found in time that grows with the square
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)
_ENDS = (
    *("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"),
    *("<end_of_turn>", "<EOT>"),
)
"""Control tokens at which llama.cpp ends a stream besides those that the metadata name."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All tokens by id."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    bos_id: int | None
    unknown_id: int | None
    names: dict[str, str]
    """Texts of special tokens by the names that chat templates use: bos_token, eos_token, unk_token, pad_token."""
    end_ids: tuple[int, ...]

    def added_tokens(self) -> list[dict[str, object]]:
        """Those that are found in a text before it is cut, as tokenizer.json lists them."""
        return [
            {
                "id": token_id,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind in _SPECIAL,
            }
            for token_id, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in _SPECIAL or kind == TokenType.USER_DEFINED
        ]


def read_vocabulary(metadata: Metadata, vocab_size: int) -> Vocabulary:
    """vocab_size: rows of the embedding. Raises CheckpointError."""
    tokens = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(metadata.texts("tokenizer.ggml.tokens"))]
    if not 0 < len(tokens) <= vocab_size:
        raise metadata.refuse(f"tokenizer.ggml.tokens has {len(tokens)} entries, the embedding {vocab_size} rows")
    (common, times), longest = Counter(tokens).most_common(1)[0], max(tokens, key=len)
    if times > 1:
        raise metadata.refuse(f"tokenizer.ggml.tokens: {common[:60]!r} is given twice")
    if len(longest) > _MOST_CHARACTERS:
        raise metadata.refuse(f"tokenizer.ggml.tokens: {longest[:60]!r}... has {len(longest)} characters")
    found = metadata.numbers("tokenizer.ggml.token_type", len(tokens))
    types = tuple(int(kind) for kind in found) if found else (int(TokenType.NORMAL),) * len(tokens)
    ids = {
        name: metadata.token_id(f"tokenizer.ggml.{name}_token_id", len(tokens))
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    names = {"bos_token": ids["bos"], "eos_token": ids["eos"], "unk_token": ids["unknown"], "pad_token": ids["padding"]}
    ends = [ids[name] for name in ("eos", "eot", "eom")]
    ends += [i for i, text in enumerate(tokens) if text in _ENDS and types[i] in (*_SPECIAL, TokenType.USER_DEFINED)]
    return Vocabulary(
        tuple(tokens),
        types,
        ids["bos"],
        ids["unknown"],
        {name: tokens[token_id] for name, token_id in names.items() if token_id is not None},
        tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None)),
    )
