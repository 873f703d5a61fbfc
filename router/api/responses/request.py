"""A request of the Responses API: its fields, checked, and what they ask for. Knows nothing of HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from grammars.grammar import ANY_OBJECT, Grammar
from router.api.chat.tools import FLAT, ToolUse, checked_tools, chosen_tools
from router.api.openai.schema import (
    Integer,
    check_deadline,
    check_salt_text,
    shortened,
    template_options,
    validated,
)
from router.api.responses.options import NOT_SERVED
from router.sampling import SamplingParams, invalid


class TextFormat(BaseModel):
    """The form of the answer's text; `strict` changes nothing, it always has the form."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: str
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def grammar(self) -> Grammar | None:
        """None for plain text. Raises InvalidRequest."""
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise invalid("text.format.schema", "is needed with the type json_schema, and with it alone")
        if self.schema_ is not None:
            return Grammar.of_schema(self.schema_)
        if self.type not in ("text", "json_object"):
            raise invalid("text.format.type", f"must be text, json_object or json_schema, not {self.type!r}")
        return ANY_OBJECT if self.type == "json_object" else None


class TextConfig(BaseModel):
    """How the answer's text is to be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(BaseModel):
    """How the model is to reason."""

    model_config = ConfigDict(extra="forbid", strict=True)

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input: Any  # see router.api.responses.items
    instructions: str | None = None
    tools: Any = None  # these, and the choice among them: see router.api.chat.tools
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    store: bool | None = None
    # Extensions.
    top_k: Integer | None = None
    seed: Integer | None = None
    num_speculative_tokens: Integer | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    deadline_s: float | None = None
    priority: Integer | None = None

    def sampling(self, default_max_tokens: int | None) -> SamplingParams:
        """The options that this request asks for. Raises InvalidRequest."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,
            seed=self.seed,
            num_speculative_tokens=self.num_speculative_tokens,
            max_tokens=default_max_tokens if self.max_output_tokens is None else self.max_output_tokens,
            grammar=self._form(),
        )

    @property
    def has_form(self) -> bool:
        """Whether the answer's text must have a form."""
        return self._form() is not None

    def _form(self) -> Grammar | None:
        return self.text.format.grammar() if self.text is not None and self.text.format is not None else None

    def tool_use(self) -> ToolUse:
        """Raises InvalidRequest."""
        chosen = chosen_tools(checked_tools(self.tools, FLAT), self.tool_choice, "tool_choice", FLAT)
        is_parallel = chosen.is_parallel and self.parallel_tool_calls is not False
        return ToolUse(chosen.tools, chosen.is_required, is_parallel)

    def template_options(self) -> Mapping[str, object]:
        """What the chat template is given besides the messages. Raises InvalidRequest."""
        return template_options(self.chat_template_kwargs)

    @property
    def effort(self) -> str | None:
        """How much the model is to reason; None: as much as it does."""
        return None if self.reasoning is None else self.reasoning.effort

    def shown(self) -> dict[str, Any]:
        """The request's fields as a response repeats them."""
        format_ = self.text.format if self.text is not None else None
        reasoning = self.reasoning or ReasoningConfig()
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "model": self.model,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.effort, "summary": None},
            "store": False,
            "temperature": self.temperature,
            "text": {"format": {"type": "text"} if format_ is None else format_.model_dump(by_alias=True)},
            "tool_choice": "auto" if self.tool_choice is None else self.tool_choice,
            "tools": [{"parameters": None, "strict": False, **tool} for tool in self.tools or ()],
            "top_p": self.top_p,
            "truncation": "disabled",
            "background": False,
            "metadata": {},
        }


def parse_responses(content: object) -> ResponsesRequest:
    """A checked request. Raises InvalidRequest naming the field."""
    request = validated(ResponsesRequest, _without_neutral(content) if isinstance(content, dict) else content)
    request.tool_use()
    _check_repeated(request)
    if request.store:
        raise invalid("store", "must be false or left out: nothing is kept")
    if request.text is not None and request.text.verbosity not in (None, "medium"):
        raise invalid("text.verbosity", "must be medium: a template's option goes into chat_template_kwargs")
    check_deadline(request.deadline_s)
    check_salt_text(request.cache_salt)
    return request


def _check_repeated(request: ResponsesRequest) -> None:
    """Raise InvalidRequest for what a response could not repeat."""
    try:
        shown = request.shown()
    except ValueError:  # pydantic's, of a schema
        raise invalid("text", "is nested too deeply") from None
    for name, value in shown.items():
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise invalid(name, "is not valid Unicode (it has a lone surrogate)") from None
        except ValueError:
            raise invalid(name, "has a number that is not finite") from None
        except RecursionError:
            raise invalid(name, "is nested too deeply") from None


def _without_neutral(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content without fields that change no answer. Raises InvalidRequest for those that are not served."""
    left = {}
    for name, value in content.items():
        option = NOT_SERVED.get(name)
        if option is None:
            left[name] = value
        elif not option.asks_for_nothing(value):
            raise invalid(name, f"{shortened(json.dumps(value))} is not supported here: {option.note}")
    return left
