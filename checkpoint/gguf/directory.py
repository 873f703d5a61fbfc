"""Opens a GGUF: writes beside a link to it the other files of a model directory, once for each content of such a file.

Everything else then sees a model directory. What is written depends on the file and on this code alone, so routers and
workers of one version agree, whichever host they are on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.digest import file_digest
from checkpoint.errors import CheckpointError
from checkpoint.gguf.config import ARCHITECTURES, ModelShapes, config_json, generation_config_json
from checkpoint.gguf.container import GgufHeader, TensorEntry, read_header
from checkpoint.gguf.metadata import Metadata
from checkpoint.gguf.metadata_keys import ARCHITECTURE_KEYS, TOKENIZER_KEYS
from checkpoint.gguf.names import ROPE_FACTORS, layout_name
from checkpoint.gguf.tokenizer import tokenizer_json
from checkpoint.gguf.vocabulary import read_vocabulary
from checkpoint.keys import check_keys

WEIGHTS_NAME = "model.gguf"
"""Of the file itself in a model directory."""
_FORM = 2  # of what is written: to be raised with every change, so that no directory of an older form is found
_SUFFIX = ".gguf"


def find_gguf(path: Path) -> Path | None:
    """The GGUF that stands for a model: a file of that suffix, or the only one of a directory without a config.json.

    Raises CheckpointError where a directory has several.
    """
    if not path.is_dir():
        return path if path.suffix == _SUFFIX else None
    if (path / "config.json").exists():
        return None
    found = sorted(path.glob(f"*{_SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise CheckpointError(f"{path}: has several GGUF files ({names}): name the one to serve")
    return found[0] if found else None


def open_gguf(path: Path) -> Path:
    """The model directory of a GGUF, written now if it was not before. Raises CheckpointError."""
    header = read_header(path)  # quick, and says what is wrong before the whole file is read
    try:
        folder = _folder()
        directory = folder / f"{file_digest(path)}-{_FORM}"
        if not (directory / "config.json").exists():
            _write(directory, _files(header), path)
        _link(directory, path)
    except OSError as error:
        raise CheckpointError(f"{path}: its model directory cannot be written: {error}") from None
    return directory


def _files(header: GgufHeader) -> dict[str, str]:
    """The contents of the directory's text files, by name."""
    metadata = Metadata(header.metadata, header.path)
    architecture = metadata.text("general.architecture")
    _check(metadata, architecture)
    tensors = {entry.name: entry for entry in header.tensors}
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise metadata.refuse("no matrix token_embd.weight")
    shapes = ModelShapes(
        vocab_size=embedding.shape[0],
        has_head="output.weight" in tensors,
        rope_divisors=_numbers(header.path, tensors.get(ROPE_FACTORS)),
        block_types={
            layout_name(entry.name, architecture).of_expert("*").removesuffix(".weight"): entry.kind.name
            for entry in header.tensors
            if not entry.kind.is_number
        },
    )
    vocabulary = read_vocabulary(metadata, shapes.vocab_size)
    files: dict[str, Mapping[str, Any]] = {
        "config.json": config_json(metadata, architecture, shapes, vocabulary.end_ids),
        "generation_config.json": generation_config_json(metadata, vocabulary.end_ids),
        "tokenizer.json": tokenizer_json(metadata, vocabulary),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **vocabulary.names},
    }
    texts = {name: json.dumps(content, ensure_ascii=False, indent=1) for name, content in files.items()}
    if "tokenizer.chat_template" in header.metadata:
        texts["chat_template.jinja"] = metadata.text("tokenizer.chat_template")
    return texts


def _check(metadata: Metadata, architecture: str) -> None:
    """Refuse what cannot be served, and keys that nothing is known of."""
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise metadata.refuse(f"general.architecture={architecture!r} is not supported (supported: {known})")
    if metadata.text("general.type", "model") != "model":
        raise metadata.refuse(f"general.type={metadata.text('general.type')!r}: is no model by itself")
    if metadata.values.get("split.count", 0) not in (0, 1):
        raise metadata.refuse(
            f"split.count={metadata.values['split.count']}: is one part of several; "
            "llama-gguf-split --merge makes one file of them"
        )
    for prefix, table in ((architecture, ARCHITECTURE_KEYS[architecture]), ("tokenizer", TOKENIZER_KEYS)):
        said = {
            key.removeprefix(f"{prefix}."): value
            for key, value in metadata.values.items()
            if key.startswith(f"{prefix}.") and not key.startswith("tokenizer.chat_template.")
        }
        check_keys(said, table, f"{metadata.path}: {prefix}", if_unknown="")


def _numbers(path: Path, entry: TensorEntry | None) -> tuple[float, ...]:
    """All values of a tensor of 32-bit floats; () of none."""
    if entry is None:
        return ()
    if entry.kind.name != "F32" or entry.num_bytes > 1 << 16:
        raise CheckpointError(f"{path}: {entry.name} is {entry.kind.name} {list(entry.shape)}, not F32 of a head")
    with path.open("rb") as file:
        data = os.pread(file.fileno(), entry.num_bytes, entry.offset)
    return struct.unpack(f"<{len(data) // 4}f", data)


def _folder() -> Path:
    """Where model directories are kept: in this user's cache, or where there is none, among temporary files."""
    import platformdirs

    with contextlib.suppress(OSError, RuntimeError):  # the latter: a user without a home, and without a name
        folder = platformdirs.user_cache_path("switchyard", appauthor=False) / "gguf"
        if folder.is_absolute():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    folder = Path(tempfile.gettempdir()) / f"switchyard-gguf-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    stat = folder.lstat()
    if folder.is_symlink() or stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
        raise PermissionError(f"{folder} is not this user's own")
    return folder


def _write(directory: Path, files: Mapping[str, str], path: Path) -> None:
    """All at once: others see the directory whole or not at all."""
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=directory.parent))
    try:
        for name, content in files.items():
            with (unfinished / name).open("w", encoding="utf-8", newline="") as file:
                file.write(content)
        (unfinished / WEIGHTS_NAME).symlink_to(path.resolve())
        unfinished.rename(directory)
    except OSError:
        if not (directory / "config.json").exists():  # otherwise another process was quicker
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _link(directory: Path, path: Path) -> None:
    """See that the directory's weights are this file: that which it was written for may have moved."""
    link, target = directory / WEIGHTS_NAME, path.resolve()
    if link.resolve() == target:
        return
    new = directory / f".{WEIGHTS_NAME}.{os.getpid()}"
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)
