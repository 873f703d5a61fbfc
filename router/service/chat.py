"""Chat messages to a prompt, by the model's own jinja2 template.

A template gets each message as it came, but for what it cannot print as it is meant: service.chat_probes finds that out
once. Knows what templates expect to find (Hugging Face's conventions); knows nothing of HTTP or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import jinja2

from router.errors import InvalidRequest, ModelFilesError
from router.service.chat_environment import BoundedTemplate, TooMuchWork
from router.service.chat_probes import ChatConventions, Json, Shape

# Names under which clients send a message's reasoning; the first one is what most templates read, gpt-oss' read the
# second.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_ANSWER = "probeanswer"


class ChatTemplate:
    """One model's template, compiled and probed once. Raises ModelFilesError."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str = "chat template") -> None:
        """where: file and key of the template, for errors."""
        self.uses_clock = "strftime_now" in source
        self._special_tokens = dict(special_tokens)
        self._where = where
        try:
            self._template = BoundedTemplate(source)
        except Exception as error:  # jinja2's, or Python's of what jinja2 makes of a template: too deep, too large
            line = getattr(error, "lineno", None) if isinstance(error, jinja2.TemplateError) else None
            at_line = f", line {line}" if line else ""
            raise ModelFilesError(f"{where}{at_line}: {error or type(error).__name__}") from None
        self._conventions = ChatConventions.of(self._try_render)

    def render(self, messages: Sequence[Mapping[str, object]], options: Mapping[str, object] | None = None) -> str:
        """The prompt that asks for the assistant's next message. Raises InvalidRequest when the template refuses.

        options: what the template is given besides (chat_template_kwargs).
        """
        try:
            return self._render([_fit(message, self._conventions) for message in messages], options or {})
        except Exception as error:  # the template is foreign code: any error it raises refuses the chat
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from None

    def after_answer(self) -> str:
        """What the template writes after an assistant's message; empty when it cannot be found."""
        messages: list[Json] = [{"role": "user", "content": "probequestion"}, {"role": "assistant", "content": _ANSWER}]
        shown = self._try_render(messages, {"add_generation_prompt": False}) or ""
        return shown.rpartition(_ANSWER)[2] if _ANSWER in shown else ""

    def _render(self, messages: Sequence[Json], options: Mapping[str, object]) -> str:
        defaults = {"add_generation_prompt": True, "tools": None, "documents": None}
        return self._template.render({**defaults, **self._special_tokens, **options, "messages": messages})

    def _try_render(self, messages: Sequence[Json], options: Mapping[str, object] | None = None) -> str | None:
        try:
            return self._render(messages, options or {})
        except TooMuchWork as error:  # of a conversation of three messages
            raise ModelFilesError(f"{self._where}: does not come to an end: {error}") from None
        except Exception:  # as in render()
            return None


def _fit(message: Mapping[str, object], conventions: ChatConventions) -> Json:
    """A message as its template can take it. Fields that are null are as good as absent, as in transformers."""
    fitted: Json = {key: value for key, value in message.items() if value is not None or key == "content"}
    role = str(message.get("role"))
    content = message.get("content")
    shape = Shape(role, bool(fitted.get("tool_calls")), "content" not in message)
    if content is None and shape not in conventions.shapes_without_text:
        fitted["content"] = ""
    elif isinstance(content, list) and role not in conventions.roles_with_parts:
        fitted["content"] = "".join(part["text"] for part in content)
    elif isinstance(content, str) and role in conventions.roles_without_plain_text:
        fitted["content"] = [{"type": "text", "text": content}]
    if conventions.parses_arguments and isinstance(calls := fitted.get("tool_calls"), list):
        fitted["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    reasoning = next((fitted[name] for name in _REASONING_FIELDS if name in fitted), None)
    return fitted if reasoning is None else {"thinking": reasoning, **fitted, "reasoning_content": reasoning}


def _with_parsed_arguments(call: object) -> object:
    """A tool call whose arguments are an object; as it is when they are no JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    assert isinstance(call, dict), "only an object has arguments"
    return {**call, "function": {**call["function"], "arguments": parsed}}
