"""Reads the JSON files of a model directory. Knows nothing of what they mean."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError


def read_json(path: Path, is_required: bool = False, ignored: Collection[str] = ()) -> dict[str, Any]:
    """The object in the file; {} when the file is missing and not required. Raises CheckpointError.

    ignored: keys that the operator answers for (`model.ignore_keys`): the file is read as if it did not have them.
    """
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
    return {key: value for key, value in content.items() if key not in ignored}
