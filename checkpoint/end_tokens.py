"""The end-of-sequence tokens that a model's own files name by id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError


def end_token_ids(config: dict[str, Any], generation: dict[str, Any], directory: Path) -> tuple[int, ...]:
    """What config.json and generation_config.json say, each id once: one or several; null is as good as absent.

    Raises CheckpointError.
    """
    found: dict[int, None] = {}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if type(token_id) is not int or token_id < 0:
                raise CheckpointError(
                    f"{directory}/{name}: eos_token_id must be a token id or a list of them, not {value!r}"
                )
        found |= dict.fromkeys(ids)
    return tuple(found)
