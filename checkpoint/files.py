"""Reads the JSON files of a model directory. Knows nothing of what they mean."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError for a file of which only Git's pointer is there, as after a clone without Git LFS."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(f"{path}: is a pointer of Git LFS and not the file itself (git lfs pull fetches it)")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys, none of which may come twice: readers do not agree on which of them counts."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice if twice.isprintable() else ascii(twice)} is given twice")
    return content


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The object that the content of a file is. Raises CheckpointError."""
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # the latter of what is nested thousands of times
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return parsed


def read_json(path: Path, is_required: bool = False, ignored: Collection[str] = ()) -> dict[str, Any]:
    """The object in the file; {} when the file is missing and not required. Raises CheckpointError.

    ignored: keys that the operator answers for (`model.ignore_keys`): the file is read as if it did not have them.
    """
    try:
        refuse_pointer(path)
        content = path.read_bytes()
    except FileNotFoundError:
        if is_required:
            raise CheckpointError(f"{path}: missing") from None
        return {}
    except OSError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    return {key: value for key, value in parse_json(content, path).items() if key not in ignored}
