"""Blocks of token ids that a model is calibrated and measured on: from a text, from token ids, or its own samples.

Knows nothing of what is done with them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import CompressError

_MEASURED_SHARE = 4  # without a file of its own, every fourth block is measured on


@dataclass(frozen=True, slots=True)
class TokenBlocks:
    """Equally long pieces of token streams."""

    calibration: Tensor  # int64 [blocks, tokens]; methods may read these
    held_out: Tensor  # int64 [blocks, tokens]; the loss is measured on these

    @property
    def digest(self) -> str:
        """Tells these blocks from others."""
        parts = (self.calibration, self.held_out)
        return hashlib.blake2b(b"".join(t.numpy().tobytes() for t in parts), digest_size=16).hexdigest()


def read_blocks(path: Path, model_dir: Path, vocab_size: int, num_tokens: int, most: int) -> Tensor:
    """The first blocks of a text (.txt, .py, ...) or of token ids (.json: a list or a list of lists; .npy).

    Raises CompressError naming the file.
    """
    ids = _read_ids(path, model_dir)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise CompressError(f"{path}: has token ids outside of 0 .. {vocab_size - 1}")
    num_blocks = min(len(ids) // num_tokens, most)
    if num_blocks < 1:
        raise CompressError(f"{path}: {len(ids)} tokens are less than one block of {num_tokens}")
    return ids[: num_blocks * num_tokens].view(num_blocks, num_tokens)


def split_blocks(blocks: Tensor, source: str) -> TokenBlocks:
    """Every fourth block is held out; the others calibrate."""
    if len(blocks) < 2:
        raise CompressError(f"{source}: one block cannot both calibrate and be measured on; give --held-out")
    is_measured = torch.arange(len(blocks)) % _MEASURED_SHARE == min(_MEASURED_SHARE, len(blocks)) - 1
    return TokenBlocks(blocks[~is_measured], blocks[is_measured])


def _read_ids(path: Path, model_dir: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            return _from_npy(path)
        if path.suffix == ".json":
            return _from_json(path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CompressError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CompressError(f"{path}: not a text in UTF-8 (token ids are read from .json and .npy)") from None
    return torch.tensor(_tokenizer(model_dir).encode(text).ids, dtype=torch.int64)


def _tokenizer(model_dir: Path):  # type: ignore[no-untyped-def]  # tokenizers has no types
    from tokenizers import Tokenizer

    file = model_dir / "tokenizer.json"
    if not file.exists():
        raise CompressError(f"{file}: missing; a text needs it (token ids are read from .json and .npy)")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CompressError(f"{file}: {error}") from None


def _from_npy(path: Path) -> Tensor:
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise CompressError(f"{path}: {error}") from None
    if not np.issubdtype(found.dtype, np.integer):
        raise CompressError(f"{path}: token ids are whole numbers, not {found.dtype}")
    return torch.from_numpy(found.astype(np.int64)).flatten()


def _from_json(path: Path) -> Tensor:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found if found and isinstance(found[0], list) else [found]
        ids = [token_id for row in rows for token_id in row]
        if not all(type(token_id) is int for token_id in ids):
            raise ValueError("not all are whole numbers")
        return torch.tensor(ids, dtype=torch.int64)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CompressError(f"{path}: not a list of token ids ({error})") from None
