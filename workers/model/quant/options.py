"""The values of a quantization_config, checked as they are taken. Without torch. Knows nothing of what they are for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from workers.errors import ModelError


@dataclass(frozen=True, slots=True)
class Options:
    """An object of a quantization_config; each method raises ModelError naming the key."""

    raw: Mapping[str, Any]
    where: str  # what an error begins with: FILE: quantization_config

    def known(self, *keys: str) -> None:
        """Refuse every key that is not among these."""
        unknown = sorted(set(self.raw) - set(keys))
        if unknown:
            raise ModelError(f"{self.where}.{unknown[0]}: unknown key")

    def one_of(self, key: str, values: Collection[Any], default: Any = None) -> Any:
        """A value that is one of these. default: for null, and for a key that is not there."""
        value = self.raw.get(key)
        value = default if value is None else value
        # True is 1 in Python.
        if not any(value == known and type(value) is type(known) for known in values):
            served = ", ".join("null" if known is None else repr(known) for known in values)
            raise ModelError(f"{self.where}.{key}={value!r} is not served (served: {served})")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(key, "an integer")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number that is not negative."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise self.wrong(key, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty for null."""
        value = self.raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.wrong(key, "a list of texts")
        return tuple(value)

    def object(self, key: str) -> Options | None:
        """An object; None for null."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Options(value, f"{self.where}.{key}")

    def wrong(self, key: str, kind: str) -> ModelError:
        """The error of a value of another kind."""
        return ModelError(f"{self.where}.{key} must be {kind}, not {self.raw.get(key)!r}")


def check_pattern(pattern: str, where: str) -> str:
    """The regular expression, if it is one. Raises ModelError."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ModelError(f"{where}: {pattern!r} is not a regular expression ({error})") from None
    return pattern
