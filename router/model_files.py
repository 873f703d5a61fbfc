"""What a router reads of a model directory: names, limits and the files that text needs. Reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.end_tokens import end_token_ids
from checkpoint.errors import CheckpointError
from checkpoint.files import read_json
from checkpoint.generation_keys import GENERATION_KEYS
from checkpoint.identity import tokenizer_digest
from checkpoint.keys import check_keys
from checkpoint.tokenizer_keys import check_tokenizer_files
from router.errors import ModelFilesError
from router.sampling import LARGEST_FLOAT32

_NO_DEFAULTS = " (model.generation_config=none starts the model without the file's sampling options)"
GENERATION_CONFIG = ("auto", "none")  # whether generation_config.json gives requests their defaults


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets that leaves it open: generation_config.json's values; None where it has none."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 means no limit
    max_new_tokens: int | None = None  # of chats
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the model's family reads of config.json."""

    context_tokens: int = 0
    """Most tokens of prompt and completion; 0 means max_position_embeddings, which must be in the file."""
    vocab_size: int = 0
    """Its size; 0 means vocab_size, which must be in the file."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The model as its clients see it."""

    name: str
    context_tokens: int
    vocab_size: int
    tokenizer_json: Path
    chat_template: str | None
    chat_template_where: str  # its file and key
    special_tokens: dict[str, str]  # "bos_token", "eos_token", ... as a chat template may use them
    tokenizer: str  # digest of tokenizer.json
    eos_token_ids: tuple[int, ...] = ()  # of config.json and generation_config.json: those that workers stop at
    sampling_defaults: SamplingDefaults = SamplingDefaults()

    @classmethod
    def load(
        cls,
        directory: str | Path,
        name: str,
        generation_config: str = "auto",
        ignore_keys: Collection[str] = (),
        limits: ModelLimits = ModelLimits(),  # frozen
    ) -> ModelFiles:
        """Read a Hugging Face model directory. Raises ModelFilesError naming the file or the field.

        generation_config: auto, or none, which leaves the sampling defaults out. ignore_keys: of the JSON files, that
        are passed over though nothing is known of them.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ModelFilesError(f"{directory}: no such model directory")
        try:
            config = read_json(directory / "config.json", is_required=True, ignored=ignore_keys)
            generation = read_json(directory / "generation_config.json", ignored=ignore_keys)
            tokenizer_config = read_json(directory / "tokenizer_config.json", ignored=ignore_keys)
            names = _names(directory, tokenizer_config, ignore_keys)
            check_tokenizer_files(directory, ignore_keys)
            if generation_config != "none":
                check_keys(generation, GENERATION_KEYS, directory / "generation_config.json", _NO_DEFAULTS)
            vocab_size = limits.vocab_size or _positive(config, "vocab_size", directory)
            end_ids = end_token_ids(config, generation, directory, vocab_size)
            tokenizer = tokenizer_digest(directory)
        except CheckpointError as error:
            raise ModelFilesError(str(error)) from None
        template, where = _chat_template(directory, tokenizer_config)
        return cls(
            name=name,
            context_tokens=limits.context_tokens or _positive(config, "max_position_embeddings", directory),
            vocab_size=vocab_size,
            tokenizer_json=directory / "tokenizer.json",
            chat_template=template,
            chat_template_where=where,
            special_tokens=_special_tokens(names),
            tokenizer=tokenizer,
            eos_token_ids=end_ids,
            sampling_defaults=(
                SamplingDefaults() if generation_config == "none" else _sampling_defaults(generation, directory)
            ),
        )


def _names(directory: Path, tokenizer_config: dict[str, Any], ignore_keys: Collection[str]) -> dict[str, Any]:
    """Where special tokens are named."""
    if "added_tokens_decoder" in tokenizer_config:  # as transformers decides
        return tokenizer_config
    return {**tokenizer_config, **read_json(directory / "special_tokens_map.json", ignored=ignore_keys)}


def _positive(config: dict[str, Any], field: str, directory: Path) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelFilesError(f"{directory}/config.json: {field} must be a positive number, not {value!r}")
    return value


def _chat_template(directory: Path, tokenizer_config: dict[str, Any]) -> tuple[str | None, str]:
    """The template, and where it stands."""
    file = directory / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8"), str(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFilesError(f"{file}: not readable as text ({error})") from None
    template, where = tokenizer_config.get("chat_template"), f"{directory}/tokenizer_config.json: chat_template"
    if isinstance(template, list) and all(map(_is_named_template, template)):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str | None):
        raise ModelFilesError(f"{where} must be a text, or a list of objects with name and template")
    return template, where


def _is_named_template(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for key, value in tokenizer_config.items():
        if not key.endswith("_token"):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[key] = content
    return tokens


def _sampling_defaults(generation: dict[str, Any], directory: Path) -> SamplingDefaults:
    def number(field: str, wanted: str, holds: Callable[[float], bool]) -> float | None:
        value = generation.get(field)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and holds(value)):
            raise ModelFilesError(f"{directory}/generation_config.json: {field} must be {wanted}, not {value!r}")
        return value

    top_k = number("top_k", "an integer >= -1", lambda value: -1 <= value < 2**32 and value == int(value))
    limit = number("max_new_tokens", "a positive integer", lambda value: 0 < value < 2**63 and value == int(value))
    return SamplingDefaults(
        temperature=number("temperature", "a finite number >= 0", lambda value: 0 <= value <= LARGEST_FLOAT32),
        top_p=number("top_p", "in (0, 1]", lambda value: 0 < value <= 1),
        top_k=None if top_k is None else max(0, int(top_k)),
        max_new_tokens=None if limit is None else int(limit),
        min_p=number("min_p", "in [0, 1]", lambda value: 0 <= value <= 1),
        typical_p=number("typical_p", "in (0, 1]", lambda value: 0 < value <= 1),
        repetition_penalty=number("repetition_penalty", "in [0.01, 10]", lambda value: 0.01 <= value <= 10),
    )
