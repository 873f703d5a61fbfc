"""Finds the draft model or the head of speculative decoding, and sees that it fits the served model. Knows nothing of
Ray."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from checkpoint.errors import CheckpointError
from checkpoint.identity import tokenizer_digest
from deploy.config import DEMO_DRAFTS, ClusterConfig
from deploy.errors import ConfigError
from deploy.preflight import FoundModel
from workers.config import resolve_model
from workers.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.heads.eagle3_config import read_eagle3
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint

_KEY = "speculative.model"
_NEEDS = {
    "draft_model": "a smaller model with the tokenizer of the served one",
    "eagle3": "the directory of a head that was trained for the served model",
}


def check_draft(config: ClusterConfig, model: FoundModel) -> str:
    """The draft as workers on other hosts find it, as FoundModel.reference; "" without one. Raises ConfigError."""
    options = config.speculative
    context_tokens = config.model.max_model_len or model.config.max_position_embeddings
    if options.most_tokens >= context_tokens:
        raise ConfigError(
            f"speculative.num_speculative_tokens: {options.most_tokens} do not fit into a context of {context_tokens}"
        )
    if options.method not in _NEEDS:
        return ""
    wanted = options.model or ("" if config.model.path else str(DEMO_DRAFTS[options.method]))
    if not wanted:
        raise ConfigError(f"{_KEY}: method={options.method} needs {_NEEDS[options.method]}")
    try:
        directory = resolve_model(wanted).resolve()
        if options.method == "eagle3":
            read_eagle3(directory, model.config, config.model.ignore_keys)
            return _reference(wanted)
        draft = load_config(directory, config.model.ignore_keys, config.model.plugins)
        check_checkpoint(directory, draft)
        _check_fit(wanted, draft, directory, model)
    except (ModelError, CheckpointError) as error:
        raise ConfigError(f"{_KEY}: {error}") from None
    return _reference(wanted)


def _reference(wanted: str) -> str:
    path = Path(wanted).expanduser()
    return str(path.resolve()) if path.exists() else wanted


def _check_fit(wanted: str, draft: ModelConfig, directory: Path, model: FoundModel) -> None:
    if draft.vocab_size != model.config.vocab_size:
        raise ModelError(f"{wanted}: has {draft.vocab_size} tokens, and the served model {model.config.vocab_size}")
    is_same = tokenizer_digest(directory) == tokenizer_digest(model.directory)
    if not is_same and _ids(directory) != _ids(model.directory):
        raise ModelError(f"{wanted}: its tokenizer is not that of the served model")


def _ids(directory: Path) -> dict[str, int]:
    """The tokenizer's texts and their ids: what two files must have in common. Raises ModelError."""
    path = directory / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # what the Rust side raises has no other type
        raise ModelError(f"{path}: {error}") from None
