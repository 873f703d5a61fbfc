"""Reads a JSON or YAML file into a dataclass, and writes one for another process to read.

pydantic checks the types; ranges are checked by the dataclasses themselves (settings.limits), whose ValueErrors begin
with "key: ".
A field that is declared with repr=False holds a secret: what it holds is in no message.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from settings.limits import OneOf, hints_of, limits_of

T = TypeVar("T")

_MOST_LEVELS = 100
_MOST_VALUES = 100_000


class SettingsError(Exception):
    """A file, a key or a value is wrong; one line that names it."""


def load(expected: type[T], path: str | Path) -> T:
    """What a file holds. Raises SettingsError with the file and the path of the first key that is wrong."""
    return build(expected, read(path), str(path))


def build(expected: type[T], raw: Mapping[str, Any], source: str = "") -> T:
    """Check the content of a file. Raises SettingsError; source: what the message begins with."""
    prefix = f"{source}: " if source else ""
    problem = _endless(raw) or _unknown_key(raw, expected, "")
    if problem:
        raise SettingsError(prefix + problem)
    try:
        # JSON's strict mode takes mappings for dataclasses, yet neither "2" for 2 nor 1 for true.
        return TypeAdapter(expected).validate_json(json.dumps(_with_words(raw, expected), default=str), strict=True)
    except ValidationError as error:
        raise SettingsError(prefix + _first_problem(error, expected)) from None
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{prefix}{error}") from None


def write(path: str | Path, value: object) -> None:
    """For a process that loads it. Nobody but this user may read the file: it may hold a secret."""
    content = TypeAdapter(type(value)).dump_json(value)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)  # an older file keeps its mode otherwise
        file.write(content)


def read(path: str | Path) -> dict[str, Any]:
    """The keys and values of a file, not yet checked: JSON where its name says so, else YAML. Raises SettingsError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = _from_json(text) if Path(path).suffix == ".json" else yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or 'unreadable'})") from None
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except _GivenTwice as error:
        raise SettingsError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # a date or a number that is none; nested thousands of times
        raise SettingsError(f"{path}: not readable ({error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must hold keys and values, not {_kind(content)}")
    return content


# ---- words that YAML reads as booleans


def _with_words(value: object, expected: object) -> object:
    """With `off` where YAML has read false, and a field may be `off`. The keys are known to be right."""
    for limit in limits_of(expected):
        if isinstance(limit, OneOf):
            return limit.as_word(value)
    if not isinstance(value, Mapping):
        return value
    if typing.get_origin(expected) is dict:
        below = typing.get_args(expected)[1]
        return {key: _with_words(item, below) for key, item in value.items()}
    if not (isinstance(expected, type) and dataclasses.is_dataclass(expected)):
        return value
    hints = hints_of(expected)
    return {key: _with_words(item, hints[key]) for key, item in value.items()}


# ---- keys that are given twice, of which both languages would keep the last one without a word


class _GivenTwice(ValueError):
    """The message names the key."""


def _from_json(text: str) -> object:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _GivenTwice(f"{key} is given twice")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=once)


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in YAML; `<<` comes first and may be overridden."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# ---- what is wrong


def _endless(raw: object) -> str | None:
    """What is wrong with a content that would fill the memory when it is written out, or None: YAML's aliases may stand
    for what they are in, or for many copies of many copies."""
    left, num_values = [(raw, 0)], 0
    while left:
        value, depth = left.pop()
        num_values += 1
        if depth > _MOST_LEVELS:
            return f"is nested in more than {_MOST_LEVELS} levels, or in itself"
        if num_values > _MOST_VALUES:
            return f"holds more than {_MOST_VALUES} values"
        below = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        left += [(each, depth + 1) for each in below]
    return None


def _unknown_key(value: object, expected: object, path: str) -> str | None:
    """What is wrong with the first unknown key below `path`, or None. Types are checked elsewhere."""
    if not isinstance(value, Mapping):
        return None
    if typing.get_origin(expected) is dict:
        below = typing.get_args(expected)[1]
        found = (_unknown_key(item, below, f"{path}.{key}") for key, item in value.items())
        return next((problem for problem in found if problem), None)
    if not (isinstance(expected, type) and dataclasses.is_dataclass(expected)):
        return None
    hints = typing.get_type_hints(expected)
    for key, item in value.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            return f"{where}: unknown key" + (f" (did you mean {near[0]}?)" if near else "")
        problem = _unknown_key(item, hints[key], where)
        if problem:
            return problem
    return None


def _first_problem(error: ValidationError, expected: type) -> str:
    problem = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in problem["loc"])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ValueError):  # from a __post_init__; ours begin with "key: "
        key, separator, message = str(cause).partition(": ")
        if separator and " " not in key:
            return f"{path}.{key}: {message}" if path else str(cause)
        return f"{path}: {cause}" if path else str(cause)
    if problem["type"] == "missing":
        return f"{path}: missing"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    message = message.replace("input should be", "must be").replace("an object", "keys and values")
    said = "" if _is_secret(expected, problem["loc"]) else f", not {_kind(problem.get('input'))}"
    return f"{path}: {message}{said}"


def _is_secret(expected: object, location: tuple[int | str, ...]) -> bool:
    """Whether a field on the way to a value is declared with repr=False."""
    for part in location:
        if not (isinstance(expected, type) and dataclasses.is_dataclass(expected)):
            *_, expected = typing.get_args(expected) or (None,)
            continue
        field = next((item for item in dataclasses.fields(expected) if item.name == part), None)
        if field is None or not field.repr:
            return True
        expected = typing.get_type_hints(expected)[field.name]
    return False


def _kind(value: object) -> str:
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 40 else "a text"
    if isinstance(value, dict):
        return "keys and values"
    return "a list" if isinstance(value, list) else "nothing" if value is None else json.dumps(value, default=str)
