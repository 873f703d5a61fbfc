"""Reads the JSON files of a model directory. Knows nothing of what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError


def read_json(path: Path, is_required: bool = False) -> dict[str, Any]:
    """The object in the file; {} when the file is missing and not required. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if is_required:
            raise CheckpointError(f"{path}: missing") from None
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content
