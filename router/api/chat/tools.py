"""The tools of an OpenAI request, and which of them an answer may call.

Chats have a function in a field of the tool, the Responses API has its fields right in the tool. OpenAI's deprecated
functions are tools here. Every refusal names the field. Knows nothing of templates or parsers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from router.api.fields import object_of
from router.api.openai.schema import ChatRequest
from router.parsers.forms import Function
from router.sampling import invalid
from router.service.chat import Calls

Json = dict[str, Any]

IN_FUNCTION = "function"
"""Where a chat's tool has its name: in this field."""
FLAT = ""
"""Where a tool of the Responses API has it."""

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a chat asks for."""

    tools: tuple[Function, ...] = ()  # those that may be called
    is_required: bool = False  # one of them must be called
    is_parallel: bool = True
    is_deprecated: bool = False  # the answer has a function_call

    def calls(self) -> Calls:
        """For the chat template and the answer's parser."""
        param = "functions" if self.is_deprecated else "tools"
        return Calls(self.tools, self.is_required, self.is_parallel, param)


def chat_tools(request: ChatRequest) -> ToolUse:
    """What a chat's tools, tool_choice, parallel_tool_calls, functions and function_call ask for.

    Raises InvalidRequest.
    """
    functions, choice = request.functions, request.function_call
    is_deprecated = functions is not None and functions != []
    if is_deprecated and request.tools:
        raise invalid("functions", "cannot be given together with tools")
    if is_deprecated:
        tools = _functions(functions)
        as_choice = {"type": "function", **choice} if isinstance(choice, dict) else choice
        if as_choice == "required":
            raise invalid("function_call", "must be none, auto or an object with a name")
        chosen = chosen_tools(tools, as_choice, "function_call", FLAT)
    else:
        if choice not in (None, "none", "auto"):
            raise invalid("function_call", "needs functions")
        tools = checked_tools(request.tools, IN_FUNCTION)
        chosen = chosen_tools(tools, request.tool_choice, "tool_choice", IN_FUNCTION)
    is_parallel = chosen.is_parallel and request.parallel_tool_calls is not False and not is_deprecated
    return ToolUse(chosen.tools, chosen.is_required, is_parallel, is_deprecated)


def checked_tools(value: object, place: str) -> tuple[Function, ...]:
    """Raises InvalidRequest. place: IN_FUNCTION or FLAT."""
    tools = []
    for index, tool in enumerate(_list(value, "tools")):
        path = f"tools.{index}"
        tool = object_of(tool, path)
        kind = tool.get("type")
        if kind != "function":
            raise invalid(f"{path}.type", f"{kind!r} is not supported here; 'function' is")
        tools.append(_checked_tool(*_placed(tool, path, place)))
    return _checked_together(tools, lambda index: f"{_placed_path(f'tools.{index}', place)}.name")


def _functions(value: object) -> tuple[Function, ...]:
    tools = [_checked_tool(function, f"functions.{index}") for index, function in enumerate(_list(value, "functions"))]
    return _checked_together(tools, lambda index: f"functions.{index}.name")


def _checked_together(tools: list[Function], path_of: Callable[[int], str]) -> tuple[Function, ...]:
    """The tools. Raises InvalidRequest for too many, or two with one name. path_of: a tool's name's, by its index."""
    if len(tools) > MAX_TOOLS:
        raise invalid(path_of(MAX_TOOLS).partition(".")[0], f"at most {MAX_TOOLS}, not {len(tools)}")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            raise invalid(path_of(index), f"{tool.name!r} is the name of an earlier one, too")
        seen.add(tool.name)
    return tuple(tools)


def _checked_tool(function: object, path: str) -> Function:
    """One function. Raises InvalidRequest naming the field below path."""
    function = object_of(function, path)
    name = _name(function, path)
    description, strict = function.get("description"), function.get("strict")
    if not isinstance(description, str | None):
        raise invalid(f"{path}.description", "must be a text")
    if not isinstance(strict, bool | None):
        raise invalid(f"{path}.strict", "must be true or false")
    parameters = function.get("parameters")
    if parameters is not None:
        _check_schema(parameters, f"{path}.parameters")
    return Function(name, description, parameters, bool(strict))


def _check_schema(schema: object, path: str) -> None:
    """As far as every function's schema goes: an object with named properties."""
    schema = object_of(schema, path)
    if schema.get("type", "object") != "object":
        raise invalid(f"{path}.type", f"must be 'object', not {json.dumps(schema['type'])[:100]}")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise invalid(f"{path}.properties", "must be an object")
    for name, value in properties.items():
        if not isinstance(value, dict | bool):
            raise invalid(f"{path}.properties.{name}", "must be a JSON schema")
    required = schema.get("required", [])
    if not (isinstance(required, list) and all(isinstance(name, str) for name in required)):
        raise invalid(f"{path}.required", "must be a list of texts")


def chosen_tools(tools: tuple[Function, ...], choice: object, param: str, place: str) -> ToolUse:
    """Which of the tools, and whether one must be called. Raises InvalidRequest. place: IN_FUNCTION or FLAT."""
    if choice == "none":
        return ToolUse()
    if choice is None or choice == "auto":
        return ToolUse(tools)
    if choice == "required":
        if not tools:
            raise invalid(param, "'required' needs tools")
        return ToolUse(tools, is_required=True)
    if not isinstance(choice, dict):
        raise invalid(param, "must be none, auto, required or an object")
    if choice.get("type") == "allowed_tools":
        is_flat = place == FLAT
        allowed = choice if is_flat else choice.get("allowed_tools")
        return _allowed(tools, allowed, param if is_flat else f"{param}.allowed_tools", place)
    if choice.get("type") != "function":
        raise invalid(f"{param}.type", f"{choice.get('type')!r} is not supported here; function and allowed_tools are")
    named = _named(tools, *_placed(choice, param, place))
    return ToolUse((named,), is_required=True, is_parallel=False)  # one call, as OpenAI answers


def _allowed(tools: tuple[Function, ...], allowed: object, path: str, place: str) -> ToolUse:
    allowed = object_of(allowed, path)
    mode = allowed.get("mode")
    if mode not in ("auto", "required"):
        raise invalid(f"{path}.mode", "must be auto or required")
    chosen = []
    for index, entry in enumerate(_list(allowed.get("tools"), f"{path}.tools")):
        at = f"{path}.tools.{index}"
        entry = object_of(entry, at)
        if entry.get("type") != "function":
            raise invalid(f"{at}.type", f"{entry.get('type')!r} is not supported here; function is")
        chosen.append(_named(tools, *_placed(entry, at, place)))
    if not chosen:
        raise invalid(f"{path}.tools", "must have at least one tool")
    names = {tool.name for tool in chosen}
    return ToolUse(tuple(tool for tool in tools if tool.name in names), is_required=mode == "required")


def _named(tools: tuple[Function, ...], function: object, path: str) -> Function:
    name = _name(object_of(function, path), path)
    for tool in tools:
        if tool.name == name:
            return tool
    raise invalid(f"{path}.name", f"{name!r} is not among the tools")


def _placed(tool: Json, path: str, place: str) -> tuple[object, str]:
    """The fields of a tool's function, and where they are."""
    if not place:
        return tool, path
    if place not in tool:
        raise invalid(f"{path}.{place}", "is missing")
    return tool[place], f"{path}.{place}"


def _placed_path(path: str, place: str) -> str:
    return f"{path}.{place}" if place else path


def _name(fields: Json, path: str) -> str:
    name = fields.get("name")
    if not isinstance(name, str):
        raise invalid(f"{path}.name", "must be a text" if "name" in fields else "is missing")
    if not _NAME.fullmatch(name):
        raise invalid(f"{path}.name", "must have 1 to 64 letters, digits, underscores or dashes")
    return name


def _list(value: object, path: str) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise invalid(path, "must be a list")
    return value
