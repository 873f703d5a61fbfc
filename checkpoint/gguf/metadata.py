"""The metadata of a GGUF, checked as it is taken. Knows nothing of what it is for."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from checkpoint.errors import CheckpointError
from checkpoint.gguf.container import Value

_LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True)
class Metadata:
    """Each method raises CheckpointError naming the file and the key."""

    values: Mapping[str, Value]
    path: Path

    def refuse(self, what: str) -> CheckpointError:
        """The error of something that is not served."""
        return CheckpointError(f"{self.path}: {what}")

    def wrong(self, key: str, kind: str) -> CheckpointError:
        """The error of a value of another kind."""
        value = self.values.get(key)
        if value is None:
            return self.refuse(f"{key}: missing")
        return self.refuse(f"{key} must be {kind}, not {str(value)[:60]!r}")

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; of a list with one entry for each layer, that which all layers have."""
        value = self.values.get(key, default)
        if isinstance(value, list) and value and all(other == value[0] for other in value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.wrong(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, not negative, as short as the 32-bit float that it is stored in allows."""
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
            raise self.wrong(key, "a number of at least 0")
        return _shortest(float(value))

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list of texts")
        found = [entry for entry in value if isinstance(entry, str)]
        if len(found) < len(value):
            raise self.wrong(key, "a list of texts")
        return found

    def numbers(self, key: str, length: int) -> list[float] | None:
        """A list of so many finite numbers; None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        found = [float(entry) for entry in value if isinstance(entry, int | float)] if isinstance(value, list) else []
        if not isinstance(value, list) or not len(value) == len(found) == length or not all(map(isfinite, found)):
            raise self.wrong(key, f"a list of {length} numbers")
        return found

    def token_id(self, key: str, num_tokens: int) -> int | None:
        """The id of a token; None where none is named."""
        value = self.values.get(key)
        if value is None or value in (0xFFFFFFFF, -1):  # how some writers say that there is none
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < num_tokens:
            raise self.wrong(key, f"the id of a token in [0, {num_tokens})")
        return value


def _shortest(value: float) -> float:
    """The number with the fewest digits that is the same as a 32-bit float."""
    try:
        as_stored = struct.pack("<f", value)
    except OverflowError:
        return value
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == as_stored:
            return short
    return value
