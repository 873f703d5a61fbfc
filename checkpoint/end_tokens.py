"""The end-of-sequence tokens that a model's own files name by id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError


def end_token_ids(
    config: dict[str, Any], generation: dict[str, Any], directory: Path, vocab_size: int = 0
) -> tuple[int, ...]:
    """What config.json and generation_config.json say, each id once: one or several; null is as good as absent.

    vocab_size: where it is known (0: it is not); no model generates an id beyond it. Raises CheckpointError.
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
            if 0 < vocab_size <= token_id:
                raise CheckpointError(
                    f"{directory}/{name}: eos_token_id={token_id} is outside of the vocabulary [0, {vocab_size})"
                )
        found |= dict.fromkeys(ids)
    return tuple(found)
