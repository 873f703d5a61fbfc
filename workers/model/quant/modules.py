"""Which matrices a format has, for formats that have all of a model's layers but those that are named."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from workers.model.quant.plain import PLAIN
from workers.model.quant.storage import MatrixStorage


@dataclass(frozen=True, slots=True)
class DecoderMatrices:
    """One storage for every matrix of the layers but those that are named."""

    storage: MatrixStorage
    plain: tuple[str, ...]
    """Names, whole or some parts of them between dots, or patterns with * in them."""

    def storage_of(self, name: str) -> MatrixStorage:
        """As in StorageRule."""
        return PLAIN if ".layers." not in name or any(_names(each, name) for each in self.plain) else self.storage


def _names(said: str, name: str) -> bool:
    if "*" in said:
        return fnmatch.fnmatchcase(name, said)
    return f".{said}." in f".{name}."
