"""Fields of foreign JSON, whose refusals name their path. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.sampling import invalid


def object_of(value: object, path: str) -> dict[str, Any]:
    """The value, if it is an object. Raises InvalidRequest."""
    if not isinstance(value, dict):
        raise invalid(path, "must be an object")
    return value


def text_of(fields: Mapping[str, object], name: str, path: str) -> str:
    """A field that must be there, and a text. path: of the object. Raises InvalidRequest."""
    if name not in fields:
        raise invalid(f"{path}.{name}", "is missing")
    value = fields[name]
    if not isinstance(value, str):
        raise invalid(f"{path}.{name}", "must be a text")
    return value
