"""The input of the Responses API as the messages of a chat. Every refusal names input.N.field. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router.api.fields import object_of, text_of
from router.sampling import invalid

Json = dict[str, Any]

_TEXT_PARTS = ("input_text", "output_text", "text")
_INSTRUCTING = ("system", "developer")


def messages_of(value: object, instructions: str | None) -> Sequence[Mapping[str, object]]:
    """The conversation. Raises InvalidRequest."""
    conversation = _Conversation()
    if instructions:
        conversation.messages.append({"role": "developer", "content": instructions})
    if isinstance(value, str):
        conversation.messages.append({"role": "user", "content": value})
        return conversation.messages
    if not isinstance(value, list) or not value:
        raise invalid("input", "must be a text, or a list of at least one item")
    for index, item in enumerate(value):
        conversation.add(item, f"input.{index}")
    return conversation.messages


class _Conversation:
    """Items become messages: what the model said in one turn, reasoning, text and calls, is one of the assistant's."""

    def __init__(self) -> None:
        self.messages: list[Json] = []
        self._names: dict[str, str] = {}  # of functions, by the call's id

    def add(self, item: object, path: str) -> None:
        """The next item."""
        item = object_of(item, path)
        kind = item.get("type") or ("message" if "role" in item else None)
        match kind:
            case "message":
                self._add_message(item, path)
            case "function_call":
                self._add_call(item, path)
            case "function_call_output":
                self._add_output(item, path)
            case "reasoning":
                self._add_reasoning(item, path)
            case _:
                known = "message, function_call, function_call_output and reasoning are"
                raise invalid(f"{path}.type", f"{kind!r} is not supported here; {known}")

    def _add_message(self, item: Json, path: str) -> None:
        role = text_of(item, "role", path)
        if role not in (*_INSTRUCTING, "user", "assistant"):
            raise invalid(f"{path}.role", f"must be system, developer, user or assistant, not {role!r}")
        if "content" not in item:
            raise invalid(f"{path}.content", "is missing")
        content = _content(item["content"], role, f"{path}.content")
        last = self.messages[-1] if self.messages else None
        if role == "assistant":
            turn = self._turn("content")
            turn["content"] = content
        elif role in _INSTRUCTING and len(self.messages) == 1 and last is not None and last["role"] in _INSTRUCTING:
            # Many templates know one such message, at the start.
            self.messages[-1] = {"role": role, "content": f"{last['content']}\n\n{content}"}
        else:
            self.messages.append({"role": role, "content": content})

    def _add_call(self, item: Json, path: str) -> None:
        call_id, name = text_of(item, "call_id", path), text_of(item, "name", path)
        self._names[call_id] = name
        function = {"name": name, "arguments": text_of(item, "arguments", path)}
        calls = self._turn("").setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def _add_output(self, item: Json, path: str) -> None:
        call_id = text_of(item, "call_id", path)
        if "output" not in item:
            raise invalid(f"{path}.output", "is missing")
        message: Json = {"role": "tool", "tool_call_id": call_id}
        if call_id in self._names:
            message["name"] = self._names[call_id]
        self.messages.append({**message, "content": _content(item["output"], "tool", f"{path}.output")})

    def _add_reasoning(self, item: Json, path: str) -> None:
        """The text, else its summary; what is only there encrypted is passed over."""
        texts: list[str] = []
        for name in ("content", "summary"):
            if item.get(name) is not None and not texts:
                texts = _texts(item[name], (f"{name}_text", "reasoning_text"), f"{path}.{name}")
        if texts:
            self._turn("reasoning_content")["reasoning_content"] = "\n".join(texts)

    def _turn(self, field: str) -> Json:
        """The assistant's message that is being put together; another one where it has the field already, or calls."""
        last = self.messages[-1] if self.messages else None
        is_new = last is None or last["role"] != "assistant"
        if last is not None and field:
            is_new = is_new or last.get(field) is not None or bool(last.get("tool_calls"))
        if is_new:
            self.messages.append({"role": "assistant", "content": None})
        return self.messages[-1]


def _content(value: object, role: str, path: str) -> str:
    if isinstance(value, str):
        return value
    kinds = (*_TEXT_PARTS, "refusal") if role == "assistant" else _TEXT_PARTS
    return "".join(_texts(value, kinds, path))


def _texts(value: object, kinds: Sequence[str], path: str) -> list[str]:
    """Those of a list of parts of these kinds."""
    if not isinstance(value, list):
        raise invalid(path, "must be a list of parts" if kinds[0] not in _TEXT_PARTS else "must be a text or a list")
    texts = []
    for index, part in enumerate(value):
        at = f"{path}.{index}"
        part = object_of(part, at)
        kind = text_of(part, "type", at)
        if kind not in kinds:
            raise invalid(f"{at}.type", f"{kind!r} is not supported here; {kinds[0]} is")
        texts.append(text_of(part, "refusal" if kind == "refusal" else "text", at))
    return texts
