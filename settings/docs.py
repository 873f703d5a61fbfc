"""What the fields of configuration dataclasses mean, from the text below each field, for documents and schemas.

block_size: int = 0
\"\"\"Tokens of a KV block.\"\"\"
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", type(None): "null"}


def field_docs(cls: type) -> dict[str, str]:
    """The text below each field, on one line; those of its bases too. A field without one is an error: KeyError."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def branches(cls: type) -> Iterator[type]:
    """The dataclasses that a dataclass is made of, itself first."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from branches(part)


def json_schema(cls: type) -> dict[str, Any]:
    """The JSON schema of a dataclass, with the meaning of each field."""
    from pydantic import TypeAdapter

    schema: dict[str, Any] = TypeAdapter(cls).json_schema()
    by_name = {branch.__name__: branch for branch in branches(cls)}
    for name, part in ((cls.__name__, schema), *schema.get("$defs", {}).items()):
        part["additionalProperties"] = False  # unknown keys are refused
        for key, text in field_docs(by_name[name]).items():
            part["properties"][key]["description"] = text
    return schema


def table(cls: type) -> str:
    """The fields that hold values, in Markdown; those that hold a branch are left out."""
    hints, texts = typing.get_type_hints(cls), field_docs(cls)
    by_name = {field.name: field for field in dataclasses.fields(cls)}
    rows = [
        f"| `{name}` | {_type(hints[name])} | {_default(by_name[name])} | {_escaped(texts[name])} |"
        for name in inspect.signature(cls).parameters  # the order of a call: what is required comes first
        if not any(dataclasses.is_dataclass(part) for part in (hints[name], *typing.get_args(hints[name])))
    ]
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")  # it would begin the next column


def _type(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return f"list of {_type(arguments[0])}"
    if typing.get_origin(hint) is dict:
        return f"{_type(arguments[1])} by name"
    if isinstance(hint, types.UnionType):
        return ", ".join(_type(part) for part in arguments)
    return _NAMES[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(field.default_factory())}`"
    return "required" if field.default is dataclasses.MISSING else f"`{json.dumps(field.default)}`"
