"""A checkpoint that is being written: one finished file for each layer in OUT.partial, which becomes OUT at the end.

A run that was cut off goes on behind the last finished file. Nothing half-written ever has a final name. Knows nothing
of what the files hold.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import CompressError, DiskError

_RUN = "run.json"
_COPIED = (".json", ".jinja", ".txt", ".model")
_WEIGHTS = ("model.safetensors.index.json", "config.json", _RUN)


class PartialCheckpoint:
    """Files 0 .. num_files - 1; by convention 0 has what belongs to no layer."""

    def __init__(self, out: Path, num_files: int, options: Mapping[str, Any]) -> None:
        """Begin, or go on with what has the same options. Raises CompressError."""
        self.out, self.folder = out, out.with_name(out.name + ".partial")
        self._num_files = num_files
        if out.exists():
            raise CompressError(f"{out}: is there already")
        text = json.dumps(options, sort_keys=True, indent=1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            run = self.folder / _RUN
            if run.exists() and run.read_text() != text:
                raise CompressError(
                    f"{self.folder}: was begun with other options or files; remove it or choose another --out"
                )
            write_text(run, text)
        except BlockingIOError:
            raise CompressError(f"{self.folder}: another process writes it") from None
        except OSError as error:
            raise CompressError(f"{error.filename or self.folder}: {error.strerror}") from None

    def __enter__(self) -> PartialCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        """Others may write it now."""
        os.close(self._lock)

    def _path(self, index: int) -> Path:
        return self.folder / f"model-{index + 1:05d}-of-{self._num_files:05d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether a file is finished."""
        return self._path(index).exists()

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A finished file's tensors and notes."""
        path = self._path(index)
        try:
            return load_file(path), json.loads(_notes(path).read_text())
        except (SafetensorError, OSError, ValueError) as error:
            raise CompressError(f"{path}: {error}; remove it, and it is made again") from None

    def write(self, index: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Finish a file. Raises CompressError, as on a full disk; then nothing of it is left."""
        path = self._path(index)
        unfinished = path.with_suffix(".unfinished")
        try:
            write_text(_notes(path), json.dumps(notes))
            # Of several keys in its metadata safetensors draws the order: notes would make other bytes of each run.
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, unfinished, {"format": "pt"})
            unfinished.chmod(0o644)  # safetensors lets the owner read only
            _sync(unfinished)
            unfinished.replace(path)
        except (SafetensorError, OSError) as error:
            unfinished.unlink(missing_ok=True)
            done = sum(self.has(i) for i in range(self._num_files))
            why = "no space left" if "28" in str(error) or "StorageFull" in str(error) else str(error).splitlines()[0]
            raise DiskError(
                f"{path}: {why}; {done} of {self._num_files} files are finished, and the same command goes on"
            ) from None

    def finish(self, source: Path, config: Mapping[str, Any], reports: Mapping[str, str | bytes]) -> None:
        """Write what lies beside the weights, and give the folder its final name."""
        try:
            for file in sorted(source.iterdir()):
                if file.is_file() and file.suffix in _COPIED and file.name not in _WEIGHTS:
                    shutil.copyfile(file, self.folder / file.name)
            write_text(self.folder / "model.safetensors.index.json", json.dumps(self._index(), indent=2) + "\n")
            write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
            for name, content in reports.items():
                data = content.encode() if isinstance(content, str) else content
                (self.folder / name).write_bytes(data)
            (self.folder / "run.lock").unlink()
            (self.folder / _RUN).unlink()
            for index in range(self._num_files):
                _notes(self._path(index)).unlink()
            _sync(self.folder)
            self.folder.rename(self.out)
        except OSError as error:
            raise CompressError(f"{error.filename or self.folder}: {error.strerror}") from None

    def finish_as_file(self, write: Callable[[Path, Mapping[str, Path]], None]) -> int:
        """Make one file of the finished ones, and give it the final name. Returns its size in bytes.

        write: a file of this name, from which file has each tensor; raises OSError.
        """
        path = self.folder / "whole.unfinished"
        try:
            write(path, {name: self.folder / file for name, file in self._index()["weight_map"].items()})
            size = path.stat().st_size
            path.replace(self.out)
            _sync(self.out.parent)
            shutil.rmtree(self.folder, ignore_errors=True)
            return size
        except OSError as error:
            path.unlink(missing_ok=True)
            why = f"{error.strerror}; all layers are finished, and the same command goes on"
            raise DiskError(f"{error.filename or self.folder}: {why}") from None

    @property
    def num_bytes(self) -> int:
        """Of all finished weight files."""
        return sum(self._path(i).stat().st_size for i in range(self._num_files) if self.has(i))

    def _index(self) -> dict[str, Any]:
        places: dict[str, str] = {}
        total = 0
        for index in range(self._num_files):
            path = self._path(index)
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path.name)
            total += path.stat().st_size
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _notes(path: Path) -> Path:
    return path.with_suffix(".notes.json")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
