"""The messages of an OpenAI chat: what must be true of them before a chat template sees them as they came.

The template checks roles and fields. Every refusal names messages.N.field. Knows nothing of templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.errors import InvalidRequest


def checked_messages(value: object) -> Sequence[Mapping[str, object]]:
    """The messages, unchanged. Raises InvalidRequest."""
    if not isinstance(value, list) or not value:
        raise _invalid("messages", "must be a list of at least one message")
    for index, message in enumerate(value):
        _check(message, f"messages.{index}")
    return value


def _check(message: object, path: str) -> None:
    if not isinstance(message, dict):
        raise _invalid(path, "must be an object")
    if "role" not in message:
        raise _invalid(f"{path}.role", "is missing")
    if not isinstance(message["role"], str):
        raise _invalid(f"{path}.role", "must be a text")
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(part, f"{path}.content.{index}")
    elif content is not None and not isinstance(content, str):
        raise _invalid(f"{path}.content", "must be a text, a list of parts, or null")


def _check_part(part: object, path: str) -> None:
    if not isinstance(part, dict):
        raise _invalid(path, "must be an object")
    kind = part.get("type")
    if not isinstance(kind, str):
        raise _invalid(f"{path}.type", "must be a text")
    if kind != "text":
        raise _invalid(f"{path}.type", f"{kind!r} is not supported here; text is")
    if not isinstance(part.get("text"), str):
        raise _invalid(f"{path}.text", "must be a text")


def _invalid(param: str, complaint: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {complaint}", param=param)
