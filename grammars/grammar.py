"""A form that a completion has to have, as clients say it and as messages carry it. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from switchyard.v1 import generation_pb2

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

JSON_OPTIONS: JsonCompileOptions = {"lenient": True, "whitespace_pattern": r"(\x20|\r?\n[\x20\x09]{0,32})?"}
"""llguidance's options for JSON schemas. Lenient: it warns of keywords that it does not know, and the compiler refuses
them. Between two tokens of JSON stands a space, or a line break and its indentation, or nothing: a model that likes
white space would write nothing else until its max_tokens are used up."""


class GrammarKind(Enum):
    """How a form is written; the names are those of the message's fields."""

    JSON_SCHEMA = "json_schema"  # the schema as JSON; "{}" is any JSON value
    REGEX = "regex"  # the whole completion matches
    CHOICE = "choice"  # one of some texts
    LARK = "lark"  # llguidance's dialect of Lark
    GBNF = "gbnf"  # llama.cpp's


@dataclass(frozen=True, slots=True)
class Grammar:
    """One form."""

    kind: GrammarKind
    source: str = ""  # but for choices
    choices: tuple[str, ...] = ()

    @staticmethod
    def of_schema(schema: object) -> Grammar:
        """JSON by this schema, an object or a boolean as Python has it."""
        return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))

    @staticmethod
    def of_choices(texts: Sequence[str]) -> Grammar:
        """One of these texts."""
        return Grammar(GrammarKind.CHOICE, choices=tuple(texts))

    @staticmethod
    def of(message: generation_pb2.Grammar) -> Grammar | None:
        """What a message says; None when it says nothing."""
        name = message.WhichOneof("kind")
        if name is None:
            return None
        kind = GrammarKind(name)
        if kind is GrammarKind.CHOICE:
            return Grammar.of_choices(message.choice.texts)
        return Grammar(kind, getattr(message, name))

    def message(self) -> generation_pb2.Grammar:
        """The inverse."""
        if self.kind is GrammarKind.CHOICE:
            return generation_pb2.Grammar(choice=generation_pb2.Texts(texts=self.choices))
        message = generation_pb2.Grammar()
        setattr(message, self.kind.value, self.source)
        return message


ANY_OBJECT = Grammar.of_schema({"type": "object"})
