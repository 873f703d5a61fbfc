"""Which values a field may have: declared beside its type, checked by its class, and shown in the JSON schema.

tp: Annotated[int, Bounds(at_least=1)] = 1

What depends on several fields is checked by the class itself. Knows no class.
"""

from __future__ import annotations

import functools
import math
import operator
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from re import fullmatch
from typing import Any, Protocol, runtime_checkable

_YAML_WORDS = {False: "off", True: "on"}  # YAML reads these words as booleans unless they are in quotes


@runtime_checkable
class Limit(Protocol):
    """One rule about a value."""

    def problem(self, value: Any) -> str:
        """What is wrong with it, as the end of a sentence, or ""."""
        ...

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """The schema of a value, with this rule; pydantic asks for it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Of a number. It is finite, too."""

    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None
    less_than: float | None = None
    or_zero: bool = False
    """0 has a meaning of its own, and is allowed whatever the bounds."""

    def problem(self, value: Any) -> str:
        """What is wrong with it, as the end of a sentence, or ""."""
        if self.or_zero and value == 0:
            return ""
        for bound, holds, words in (
            (self.at_least, operator.ge, "0 or at least" if self.or_zero else "at least"),
            (self.more_than, operator.gt, "more than"),
            (self.at_most, operator.le, "at most"),
            (self.less_than, operator.lt, "less than"),
        ):
            if bound is not None and not holds(value, bound):
                return f"must be {words} {_number(bound)}, not {value}"
        return f"must be finite, not {value}" if isinstance(value, float) and not math.isfinite(value) else ""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """The schema of a value, with this rule; pydantic asks for it."""
        bounds = {
            "minimum": self.at_least,
            "exclusiveMinimum": self.more_than,
            "maximum": self.at_most,
            "exclusiveMaximum": self.less_than,
        }
        known = {name: bound for name, bound in bounds.items() if bound is not None}
        return {**handler(core_schema), **({"anyOf": [{"const": 0}, known]} if self.or_zero else known)}


@dataclass(frozen=True, slots=True)
class OneOf:
    """Of a word."""

    choices: tuple[str, ...]

    def problem(self, value: Any) -> str:
        """What is wrong with it, as the end of a sentence, or ""."""
        return "" if value in self.choices else f"must be one of {', '.join(self.choices)}, not {value!r}"

    def as_word(self, value: object) -> object:
        """The word for which YAML has read a boolean, where it is one of the choices; else the value."""
        word = _YAML_WORDS[value] if isinstance(value, bool) else None
        return word if word in self.choices else value

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """The schema of a value, with this rule; pydantic asks for it."""
        booleans = [value for value, word in _YAML_WORDS.items() if word in self.choices]
        schema = dict(handler(core_schema))
        if booleans:
            del schema["type"]  # no longer text alone
        return {**schema, "enum": [*self.choices, *booleans]}


@dataclass(frozen=True, slots=True)
class Matches:
    """Of a text: a regular expression that all of it matches, and what that means in words."""

    pattern: str
    meaning: str

    def problem(self, value: Any) -> str:
        """What is wrong with it, as the end of a sentence, or ""."""
        return "" if fullmatch(self.pattern, value) else f"must be {self.meaning}, not {value!r}"

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """The schema of a value, with this rule; pydantic asks for it."""
        return {**handler(core_schema), "pattern": f"^({self.pattern})$"}


def check_limits(config: Any) -> None:
    """For the __post_init__ of a dataclass. Raises ValueError, "key: what is wrong", for the first wrong value."""
    cls: Any = type(config)
    for name, hint in hints_of(cls).items():
        for where, limit, value in _limited(name, hint, getattr(config, name)):
            problem = limit.problem(value)
            if problem:
                raise ValueError(f"{where}: {problem}")


def limits_of(hint: Any) -> tuple[Limit, ...]:
    """The rules of a type, as `hints_of` has it."""
    return tuple(part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Limit))


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, with their rules."""
    return typing.get_type_hints(cls, include_extras=True)


def _limited(where: str, hint: Any, value: Any) -> Iterator[tuple[str, Limit, Any]]:
    """Each value with a rule, in a field, its list or its mapping."""
    for limit in limits_of(hint):
        yield where, limit, value
    if isinstance(value, Mapping):
        below = typing.get_args(hint)[1]
        for key, item in value.items():
            yield from _limited(f"{where}.{key}", below, item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _limited(where, typing.get_args(hint)[0], item)


def _number(bound: float) -> str:
    """In digits; as a power where that is easier to read."""
    exponent = int(bound).bit_length() - 1
    return f"2^{exponent}" if exponent >= 31 and bound == 2**exponent else f"{bound}"
