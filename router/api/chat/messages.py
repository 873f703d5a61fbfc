"""The messages of an OpenAI chat: what must be true of them before a chat template sees them.

Roles are the template's to refuse. What templates do not know is written in the form that they do: refusals as text,
deprecated function calls as tool calls. Every refusal names messages.N.field. Knows nothing of templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router.api.fields import object_of, text_of
from router.sampling import invalid

Json = dict[str, Any]


def checked_messages(value: object) -> Sequence[Mapping[str, object]]:
    """The messages, in the forms that templates know. Raises InvalidRequest."""
    if not isinstance(value, list) or not value:
        raise invalid("messages", "must be a list of at least one message")
    functions = _DeprecatedCalls()
    return [functions.replaced(_checked(message, f"messages.{index}")) for index, message in enumerate(value)]


def _checked(message: object, path: str) -> Json:
    message = object_of(message, path)
    role = text_of(message, "role", path)
    for name in ("name", "refusal", "tool_call_id", "reasoning_content", "reasoning", "thinking"):
        if message.get(name) is not None:
            text_of(message, name, path)
    if role == "tool":
        text_of(message, "tool_call_id", path)
    if message.get("audio") is not None:
        raise invalid(f"{path}.audio", "is not supported here; text is")
    changes: Json = {}
    content = message.get("content")
    if isinstance(content, list):
        parts = [_checked_part(part, role, f"{path}.content.{index}") for index, part in enumerate(content)]
        changes["content"] = parts
    elif content is not None and not isinstance(content, str):
        raise invalid(f"{path}.content", "must be a text, a list of parts, or null")
    elif content is None and message.get("refusal"):
        changes["content"] = message["refusal"]
    for name, check in (("tool_calls", _check_calls), ("function_call", _check_function)):
        if message.get(name) is not None:
            check(message[name], f"{path}.{name}")
    if role == "function" and message.get("name") is None:
        raise invalid(f"{path}.name", "is missing")
    if message.get("tool_calls") == []:  # templates ask whether there is the field, not whether it has calls
        message = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**message, **changes} if changes else message


def _checked_part(part: object, role: str, path: str) -> Json:
    part = object_of(part, path)
    kind = text_of(part, "type", path)
    if kind == "refusal" and role == "assistant":
        return {"type": "text", "text": text_of(part, "refusal", path)}
    if kind != "text":
        raise invalid(f"{path}.type", f"{kind!r} is not supported here; text is")
    text_of(part, "text", path)
    return part


def _check_calls(calls: object, path: str) -> None:
    if not isinstance(calls, list):
        raise invalid(path, "must be a list of tool calls")
    for index, call in enumerate(calls):
        at = f"{path}.{index}"
        call = object_of(call, at)
        text_of(call, "id", at)
        if call.get("type", "function") != "function":
            raise invalid(f"{at}.type", f"{call['type']!r} is not supported here; function is")
        if "function" not in call:
            raise invalid(f"{at}.function", "is missing")
        _check_function(call["function"], f"{at}.function")


def _check_function(function: object, path: str) -> None:
    function = object_of(function, path)
    text_of(function, "name", path)
    text_of(function, "arguments", path)


class _DeprecatedCalls:
    """Function calls, which OpenAI's clients once sent, and their results, as tool calls with ids of their own."""

    def __init__(self) -> None:
        self._last_ids: dict[str, str] = {}  # by the function's name
        self._num_calls = 0

    def replaced(self, message: Json) -> Json:
        """The message with neither."""
        if message.get("function_call") is not None:
            function = message["function_call"]
            call = {"id": self._new_id(function["name"]), "type": "function", "function": function}
            rest = {key: value for key, value in message.items() if key != "function_call"}
            return {**rest, "tool_calls": [*(message.get("tool_calls") or ()), call]}
        if message["role"] == "function":
            name = message["name"]
            call_id = self._last_ids.get(name) or self._new_id(name)
            return {**message, "role": "tool", "tool_call_id": call_id}
        return message

    def _new_id(self, name: str) -> str:
        self._num_calls += 1
        self._last_ids[name] = f"call{self._num_calls:05d}"  # nine letters and digits, as Mistral's templates require
        return self._last_ids[name]
