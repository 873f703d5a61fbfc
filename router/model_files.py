"""What a router reads of a model directory: names, limits and the files that text needs. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json
from checkpoint.generation_keys import GENERATION_KEYS
from checkpoint.identity import tokenizer_digest
from checkpoint.keys import check_keys
from checkpoint.tokenizer_keys import check_tokenizer_files
from router.errors import ModelFilesError


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The model as its clients see it."""

    name: str
    context_tokens: int
    vocab_size: int
    tokenizer_json: Path
    chat_template: str | None
    special_tokens: dict[str, str]  # "bos_token", "eos_token", ... as a chat template may use them
    tokenizer: str  # digest of tokenizer.json

    @classmethod
    def load(cls, directory: str | Path, name: str, ignore_keys: Collection[str] = ()) -> ModelFiles:
        """Read a Hugging Face model directory. Raises ModelFilesError naming the file or the field.

        ignore_keys: of the JSON files, that are passed over though nothing is known of them.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ModelFilesError(f"{directory}: no such model directory")
        config = _read_json(directory / "config.json", is_required=True)
        tokenizer_config = _read_json(directory / "tokenizer_config.json", is_required=False)
        try:
            check_tokenizer_files(directory, ignore_keys)
            generation_path = directory / "generation_config.json"
            check_keys(read_json(generation_path), GENERATION_KEYS, generation_path, ignore_keys)
        except CheckpointError as error:
            raise ModelFilesError(str(error)) from None
        return cls(
            name=name,
            context_tokens=_positive(config, "max_position_embeddings", directory),
            vocab_size=_positive(config, "vocab_size", directory),
            tokenizer_json=directory / "tokenizer.json",
            chat_template=_chat_template(directory, tokenizer_config),
            special_tokens=_special_tokens(tokenizer_config),
            tokenizer=_digest(directory),
        )


def _read_json(path: Path, is_required: bool) -> dict[str, Any]:
    if not path.exists() and not is_required:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFilesError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path}: must be an object")
    return content


def _digest(directory: Path) -> str:
    try:
        return tokenizer_digest(directory)
    except CheckpointError as error:
        raise ModelFilesError(str(error)) from None


def _positive(config: dict[str, Any], field: str, directory: Path) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise ModelFilesError(f"{directory}/config.json: {field} must be a positive number, not {value!r}")
    return value


def _chat_template(directory: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for key, value in tokenizer_config.items():
        if not key.endswith("_token"):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[key] = content
    return tokens
