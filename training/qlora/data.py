"""Texts as rows of token ids: what an adapter learns from, and what it is measured on. Knows nothing of models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor


class DataError(ValueError):
    """A text or a length that cannot be trained on; the message names the option."""


@dataclass(frozen=True, slots=True)
class Rows:
    """int64 [rows, length + 1]: each token but the last is read, each but the first is foretold."""

    train: Tensor
    held_out: Tensor  # may have no rows

    @property
    def digest(self) -> str:
        """Tells these rows from others."""
        parts = b"".join(t.numpy().tobytes() for t in (self.train, self.held_out))
        return hashlib.blake2b(parts, digest_size=16).hexdigest()


def read_texts(paths: Sequence[Path], option: str) -> list[str]:
    """Files, and all files below folders, in order of their names. Raises DataError."""
    texts = []
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise DataError(f"{option}: {file}: {error.strerror}") from None
            except UnicodeDecodeError:
                raise DataError(f"{option}: {file}: not a text in UTF-8") from None
    if not any(texts):
        raise DataError(f"{option}: there is no text in {', '.join(map(str, paths))}")
    return texts


def tokenizer_of(model_dir: Path) -> Tokenizer:
    """Raises DataError."""
    file = model_dir / "tokenizer.json"
    if not file.exists():
        raise DataError(f"model: {file}: missing")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(f"model: {file}: {error}") from None


def rows_of(tok: Tokenizer, texts: Sequence[str], end_id: int | None, length: int, option: str) -> Tensor:
    """All texts as one stream, the end-of-text token before each, cut into rows. Raises DataError."""
    stream: list[int] = []
    for encoding in tok.encode_batch(list(texts), add_special_tokens=False):
        stream += [] if end_id is None else [end_id]
        stream += encoding.ids
    count = (len(stream) - 1) // length
    if count < 1:
        raise DataError(f"{option}: {len(stream)} tokens are less than a row of --length {length}")
    starts = range(0, count * length, length)
    return torch.tensor([stream[start : start + length + 1] for start in starts])
