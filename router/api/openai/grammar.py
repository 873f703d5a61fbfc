"""Structured output as OpenAI's and vLLM's clients ask for it: response_format, structured_outputs, guided_*.

Knows nothing of HTTP, or of how a grammar is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from grammars.grammar import ANY_OBJECT, Grammar, GrammarKind
from router.sampling import invalid


class JsonSchemaFormat(BaseModel):
    """The schema of response_format; `strict` changes nothing, the completion always has the form."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's response_format."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: str
    json_schema: JsonSchemaFormat | None = None

    def grammar(self) -> Grammar | None:
        """None for plain text. Raises InvalidRequest."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise invalid("response_format.json_schema", "is needed with the type json_schema, and with it alone")
        if self.type == "text":
            return None
        if self.type == "json_object":
            return ANY_OBJECT
        if self.json_schema is None:
            raise invalid("response_format.type", f"must be text, json_object or json_schema, not {self.type!r}")
        if self.json_schema.schema_ is None:
            return ANY_OBJECT
        return Grammar.of_schema(self.json_schema.schema_)


class StructuredOutputs(BaseModel):
    """vLLM's structured_outputs: one of these."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: str | dict[str, Any] | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def grammars(self) -> Mapping[str, Grammar]:
        """Those that are given, by their field."""
        return _given(self.json_, self.regex, self.choice, self.grammar) | (
            {"json_object": ANY_OBJECT} if self.json_object else {}
        )


class StructuredOutputFields(BaseModel):
    """The fields of a request that say what form its completion has."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def form(self) -> tuple[str, Grammar] | None:
        """The field that asks for a form, and the form. Raises InvalidRequest when there are two."""
        found: dict[str, Grammar] = {}
        if self.response_format is not None and (grammar := self.response_format.grammar()) is not None:
            found["response_format"] = grammar
        if self.structured_outputs is not None:
            found |= {f"structured_outputs.{name}": one for name, one in self.structured_outputs.grammars().items()}
        guided = _given(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        found |= {f"guided_{name}": one for name, one in guided.items()}
        if len(found) > 1:
            first, second, *_ = found
            raise invalid(second, f"cannot be combined with {first}")
        return next(iter(found.items()), None)


def _given(
    schema: str | dict[str, Any] | bool | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> dict[str, Grammar]:
    found: dict[str, Grammar] = {}
    if schema is not None:
        if isinstance(schema, str):
            found["json"] = Grammar(GrammarKind.JSON_SCHEMA, schema)
        else:
            found["json"] = Grammar.of_schema(schema)
    if regex is not None:
        found["regex"] = Grammar(GrammarKind.REGEX, regex)
    if choice is not None:
        found["choice"] = Grammar.of_choices(choice)
    if grammar is not None:
        found["grammar"] = Grammar(GrammarKind.GBNF if "::=" in grammar else GrammarKind.LARK, grammar)
    return found
