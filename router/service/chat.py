"""Chat messages to a prompt, by the model's own jinja2 template.

A template gets each message as it came, but for what it cannot print as it is meant: service.chat_probes finds that out
once. Knows what templates expect to find (Hugging Face's conventions); knows nothing of HTTP or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2

from grammars.grammar import Grammar
from router.errors import ContextLengthExceeded, InvalidRequest, ModelFilesError
from router.model_files import ModelFiles
from router.parsers.families import AnswerFormat, family_of
from router.parsers.forms import Function, MarkerToken, Wanted, answer_form
from router.service.chat_environment import BoundedTemplate, TooMuchWork
from router.service.chat_probes import PROBE_TOOL, ChatConventions, Json, Shape, shows_tools
from router.service.text import TextCodec

# Names under which clients send a message's reasoning; the first one is what most templates read, gpt-oss' read the
# second.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")  # of OpenAI's API
_ANSWER = "probeanswer"


@dataclass(frozen=True, slots=True)
class Calls:
    """The functions that a chat's answer may call."""

    functions: tuple[Function, ...] = ()
    is_required: bool = False  # at least one call, and no content
    is_parallel: bool = True  # more than one call in an answer
    param: str = "tools"  # the request's field


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as a text, and how to read what follows it."""

    text: str
    answer: AnswerFormat | None  # None: all of it is content
    grammar: Grammar | None  # the form that the answer must have, with all that the family writes around it


class ChatModel:
    """How one model chats, settled once from its files."""

    def __init__(self, files: ModelFiles, codec: TextCodec) -> None:
        """Raises ModelFilesError."""
        self._name = files.name
        self._context_tokens = files.context_tokens
        self.template: ChatTemplate | None = None
        if files.chat_template:
            self.template = ChatTemplate(files.chat_template, files.special_tokens, files.chat_template_where)
        self._source = files.chat_template or ""
        self.family = family_of(self._source)
        ids = codec.added_tokens(self.family.markers)
        self._tokens = {marker: MarkerToken(i, codec.is_special(i)) for marker, i in ids.items()}

    @property
    def uses_clock(self) -> bool:
        """Whether the same messages may make another prompt later."""
        return self.template is not None and self.template.uses_clock

    def effort_options(self, effort: str | None) -> Mapping[str, object]:
        """A reasoning_effort as the chat template takes it. Raises InvalidRequest where it looks at none.

        Some templates have degrees; to others reasoning is on, or off with "none".
        """
        if effort is None:
            return {}
        source = self._source
        if "reasoning_effort" in source and not (effort == "none" and "enable_thinking" in source):
            return {"reasoning_effort": effort}
        if effort not in _EFFORTS:
            raise InvalidRequest(f"reasoning_effort: must be one of {', '.join(_EFFORTS)}", param="reasoning_effort")
        if "enable_thinking" in source:
            return {"enable_thinking": effort != "none"}
        complaint = f"the chat template of model {self._name!r} does not look at it"
        raise InvalidRequest(f"reasoning_effort: {complaint}", param="reasoning_effort")

    def prompt(
        self,
        messages: Sequence[Mapping[str, object]],
        options: Mapping[str, object],
        calls: Calls = Calls(),  # frozen
        content: Grammar | None = None,
    ) -> ChatPrompt:
        """What the chat template makes of these messages, options and tools. Raises InvalidRequest.

        content: the form that the answer's content must have.
        """
        if self.template is None:
            raise InvalidRequest(f"messages: model {self._name!r} has no chat template", param="messages")
        if len(messages) > self._context_tokens:  # rendering them would take long, and each has a token at least
            complaint = f"{len(messages)} are more than the {self._context_tokens} tokens of this model's context"
            raise ContextLengthExceeded(f"messages: {complaint}", param="messages")
        if calls.functions:
            self._check_tools(self.template, calls.param)
            options = {**options, "tools": [function.shown() for function in calls.functions]}
        text = self.template.render(messages, options)
        family = self.family.after(text)
        if family.is_plain:
            return ChatPrompt(text, None, content)
        if calls.is_required and content is not None:
            raise InvalidRequest("grammar: cannot be combined with a tool call that is required", param="grammar")
        names = frozenset(function.name for function in calls.functions)
        reasons = family.starts_in_reasoning(text)
        answer = AnswerFormat(family, names, calls.is_parallel, reasons, shows_content=not calls.is_required)
        wanted = Wanted(calls.functions, calls.is_required, content)
        return ChatPrompt(text, answer, answer_form(answer, wanted, self._tokens))

    def _check_tools(self, template: ChatTemplate, param: str) -> None:
        if not template.shows_tools:
            complaint = f"the chat template of model {self._name!r} does not show tools to the model"
        elif self.family.calls is None:
            complaint = f"model {self._name!r} writes tool calls in a form that is not known here"
        else:
            return
        choice = "tool_choice" if param == "tools" else "function_call"
        raise InvalidRequest(f"{param}: {complaint}; {choice} none leaves them out", param=param)


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
        self.shows_tools = shows_tools(lambda messages: self._try_render(messages, {"tools": [PROBE_TOOL]}))

    def render(self, messages: Sequence[Mapping[str, object]], options: Mapping[str, object] | None = None) -> str:
        """The prompt that asks for the assistant's next message. Raises InvalidRequest when the template refuses.

        options: what the template is given besides (chat_template_kwargs).
        """
        try:
            return self._render([_fit(message, self._conventions) for message in messages], options or {})
        except Exception as error:  # the template is foreign code: any error it raises refuses the chat
            what = "messages and tools" if options and options.get("tools") else "messages"
            raise InvalidRequest(f"the chat template refuses these {what}: {error}", param="messages") from None

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
    if message.get("role") == "developer" and not conventions.has_developer:
        fitted["role"] = "system"
    role = str(fitted.get("role"))
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
