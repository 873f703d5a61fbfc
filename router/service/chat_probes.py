"""What a chat template can take, found by rendering small conversations with it once, at load.

OpenAI's clients send content as text, as a list of parts or as null, and the arguments of tool calls as JSON text.
Templates differ in which of these they print as they are meant. Knows no jinja2: a template is a function here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Json = dict[str, object]
Render = Callable[[Sequence[Json]], str | None]
"""The prompt of a conversation; None where the template refuses it."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_QUESTION = "probequestion"
_VALUE = "probevalue"
_ARGUMENTS = {"key": _VALUE}
_CALL_ID = "prbcall01"  # Mistral's templates require nine letters and digits
_ABSENT = object()
_TOOL = "probetool"
_UNKNOWN_ROLE = "proberole"

PROBE_TOOL: Json = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "probedescription",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "probekey"}},
            "required": ["key"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A message as far as it decides about its content."""

    role: str
    has_tool_calls: bool = False
    is_absent: bool = False  # the content's key is missing; otherwise it is null


@dataclass(frozen=True, slots=True)
class ChatConventions:
    """What a template can take. What was not probed it is not trusted with."""

    roles_with_parts: frozenset[str]  # a list of text parts shows as the parts' text
    roles_without_plain_text: frozenset[str]  # of these: a text that is not in a list of parts does not show
    shapes_without_text: frozenset[Shape]  # no content shows as no text
    parses_arguments: bool  # arguments of tool calls must be objects, not JSON text
    has_developer: bool  # its role developer is a role of its own

    @classmethod
    def of(cls, render: Render) -> ChatConventions:
        """Find them out."""
        parses_arguments = _parses_arguments(render)
        shapes = [Shape(*shape) for shape in itertools.product(ROLES, (False, True), (False, True))]
        call = _call(_ARGUMENTS if parses_arguments else json.dumps(_ARGUMENTS))
        with_parts = frozenset(role for role in ROLES if _shows_parts(render, role, call))
        return cls(
            roles_with_parts=with_parts,
            roles_without_plain_text=frozenset(role for role in with_parts if not _shows_text(render, role, call)),
            shapes_without_text=frozenset(shape for shape in shapes if _shows_nothing(render, shape, call)),
            parses_arguments=parses_arguments,
            has_developer=_has_developer(render),
        )


def shows_tools(render: Render) -> bool:
    """Whether the prompt has the tools that it is given. render: gives PROBE_TOOL to the template."""
    shown = render([{"role": "user", "content": _QUESTION}])
    return shown is not None and _TOOL in shown


def _shows_parts(render: Render, role: str, call: Json) -> bool:
    # The extra key shows only when the list or a part is printed as a whole.
    parts = [{"type": "text", "text": text, "extra": "probeextra"} for text in ("probepartone", "probeparttwo")]
    shown = render(_conversation(role, False, parts, call)) or ""
    return all(part["text"] in shown for part in parts) and "probeextra" not in shown


def _shows_text(render: Render, role: str, call: Json) -> bool:
    return "probetext" in (render(_conversation(role, False, "probetext", call)) or "")


def _shows_nothing(render: Render, shape: Shape, call: Json) -> bool:
    content = _ABSENT if shape.is_absent else None
    shown = render(_conversation(shape.role, shape.has_tool_calls, content, call))
    with_text = render(_conversation(shape.role, shape.has_tool_calls, "", call)) or ""
    return shown is not None and shown.count("None") <= with_text.count("None")


def _has_developer(render: Render) -> bool:
    """Whether a developer's message shows, and not as that of any role does; or a system's does not show either."""

    def shown(role: str) -> str:
        return render([{"role": role, "content": "probetext"}, {"role": "user", "content": _QUESTION}]) or ""

    as_developer = shown("developer")
    is_known = "probetext" in as_developer and as_developer != shown(_UNKNOWN_ROLE).replace(_UNKNOWN_ROLE, "developer")
    return is_known or "probetext" not in shown("system")


def _parses_arguments(render: Render) -> bool:
    text = json.dumps(_ARGUMENTS)
    as_text, as_object = (
        render(_conversation("assistant", True, "", _call(arguments))) or "" for arguments in (text, _ARGUMENTS)
    )
    encoded_twice = json.dumps(text)[1:-1]
    is_text_shown = _VALUE in as_text and encoded_twice not in as_text
    return not is_text_shown and _VALUE in as_object and encoded_twice not in as_object


def _call(arguments: object) -> Json:
    return {"id": _CALL_ID, "type": "function", "function": {"name": "probe", "arguments": arguments}}


def _conversation(role: str, has_tool_calls: bool, content: object, call: Json) -> Sequence[Json]:
    """A conversation that has a message of the role where templates expect one."""
    of_result: Json = {"tool_call_id": _CALL_ID, "name": "probe"}
    message: Json = {"role": role, **(of_result if role in ("tool", "function") else {})}
    if content is not _ABSENT:
        message["content"] = content
    if has_tool_calls:
        message["tool_calls"] = [call]
    question: Json = {"role": "user", "content": _QUESTION}
    if role == "user":
        return [message]
    if role in ("system", "developer"):
        return [message, question]
    if role in ("tool", "function"):
        return [question, {"role": "assistant", "content": "", "tool_calls": [call]}, message]
    result: Json = {"role": "tool", "content": "proberesult", **of_result}
    return [question, message, result if has_tool_calls else question]
