"""The form of an answer that must be a call, or whose calls or content have a form: a grammar with a family's markers.

Written in llguidance's dialect of Lark. Knows the families' forms; compiles nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grammars.grammar import JSON_OPTIONS, Grammar, GrammarKind
from router.parsers.families import DEEPSEEK, HARMONY, HERMES, LLAMA, MISTRAL, AnswerFormat, CallFormat
from router.parsers.harmony import HARMONY_MARKERS
from router.parsers.json_calls import HERMES_MARKERS
from router.parsers.named_calls import DEEPSEEK_MARKERS, MISTRAL_MARKERS

_START, _CHANNEL, _CONSTRAIN, _MESSAGE, _END, _, _ = HARMONY_MARKERS
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Function:
    """A function that an answer may call."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None  # a JSON schema of an object; None: it takes none
    is_strict: bool = False  # its arguments are held to the schema

    def shown(self) -> dict[str, Any]:
        """As OpenAI's clients send it and templates expect it, without fields that say nothing to a model."""
        fields = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {key: value for key, value in fields.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class MarkerToken:
    """A marker that is one token."""

    token_id: int
    is_special: bool  # no other tokens spell it


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an answer has to be."""

    functions: Sequence[Function] = ()
    is_required: bool = False  # a call, and nothing but calls
    content: Grammar | None = None  # the form of content


def answer_form(answer: AnswerFormat, wanted: Wanted, tokens: Mapping[str, MarkerToken]) -> Grammar | None:
    """The form of the whole answer, reasoning included; None: any. tokens: of those markers that are tokens."""
    is_called = bool(wanted.functions) and answer.family.calls is not None
    if wanted.content is not None and not _can_be_embedded(wanted.content):
        return wanted.content  # for the compiler to refuse
    if not is_called and answer.family.reasoning is None and answer.family.calls is not HARMONY:
        return wanted.content
    has_form = wanted.content is not None or (is_called and wanted.is_required)
    if not has_form and not (is_called and any(function.is_strict for function in wanted.functions)):
        return None
    writer = _Writer(answer, tokens)
    return Grammar(GrammarKind.LARK, writer.written(wanted, is_called))


class _Writer:
    """Writes one grammar."""

    def __init__(self, answer: AnswerFormat, tokens: Mapping[str, MarkerToken]) -> None:
        self._answer = answer
        self._tokens = tokens
        self._rules: list[str] = []

    def written(self, wanted: Wanted, is_called: bool) -> str:
        calls = self._answer.family.calls
        is_harmony = calls is HARMONY
        bodies = []
        if is_called:
            assert calls is not None, "looked at before"
            bodies.append(self._calls(calls, wanted))
        if not (is_called and wanted.is_required):
            content = self._content(wanted.content, calls if is_called else None)
            if is_harmony:
                content = f'{self._marker(_CHANNEL)} "final" {self._marker(_MESSAGE)} {content}'
            bodies.append(content)
            if is_called and wanted.content is None and not is_harmony and calls is not LLAMA:
                bodies.append("content calls")
        reasoning = self._analysis() if is_harmony else self._reasoning()
        self._rules.insert(0, f"start: {reasoning} body".replace("  ", " "))
        self._rules.append("body: " + " | ".join(bodies))
        return "\n".join(self._rules) + "\n"

    # -- pieces

    def _marker(self, marker: str) -> str:
        token = self._tokens.get(marker)
        if token is None:
            return _literal(marker)
        by_id = f"<[{token.token_id}]>"
        return by_id if token.is_special else f"({by_id} | {_literal(marker)})"

    def _until(self, name: str, marker: str) -> str:
        """The name of a rule: any text, then the marker."""
        if marker in self._tokens:
            self._rules.append(f"{name}: {name.upper()} {self._marker(marker)}")
            self._rules.append(f"{name.upper()}: {_text_without(marker)}")
        else:
            self._rules.append(f"{name}[suffix={_literal(marker)}]: /(?s:.*)/")
        return name

    def _reasoning(self) -> str:
        markers = self._answer.family.reasoning
        if markers is None:
            return ""
        opening, closing = markers
        self._rules.append(r"BREAKS: /\n{0,2}/")
        until = self._until("reasoning", closing)
        if self._answer.starts_in_reasoning:
            return f"{until} BREAKS"
        return f"({self._marker(opening)} {until} BREAKS)?"

    def _analysis(self) -> str:
        until = self._until("analysis", _END)
        message = f'{self._marker(_CHANNEL)} "analysis" {self._marker(_MESSAGE)} {until}'
        return f'({message} {self._marker(_START)} "assistant")*'

    def _content(self, form: Grammar | None, calls: CallFormat | None) -> str:
        if form is not None:
            self._rules.append("content: " + _embedded(form))
        elif calls is LLAMA:  # where a call may begin no other brace does
            self._rules.append(r"content: CONTENT")
            self._rules.append(r"CONTENT: /[^\s{](?s:.*)/")
        elif calls is None or calls is HARMONY:
            self._rules.append(r"content: CONTENT")
            self._rules.append(r"CONTENT: /(?s:.*)/")
        else:
            self._rules.append("content: CONTENT")
            self._rules.append("CONTENT: " + _text_without(calls.markers[0], "+"))
        return "content"

    def _calls(self, calls: CallFormat, wanted: Wanted) -> str:
        shape = _SHAPES[calls.name](self._marker, self._answer.family.has_bare_calls)
        names = []
        for index, function in enumerate(wanted.functions):
            is_held = wanted.is_required or function.is_strict
            schema = (function.parameters or _NO_ARGUMENTS) if is_held else {"type": "object"}
            self._rules.append(f"arguments{index}: %json {_guided(schema)}")
            if calls is LLAMA and wanted.content is not None:
                # A lexer that has begun the text of a call cannot go on with content of the same beginning: both are
                # JSON then.
                call = f"%json {_guided(_call_schema(function.name, schema))}"
            else:
                call = shape.call(function.name, f"arguments{index}")
            self._rules.append(f"call{index}: {call}")
            names.append(f"call{index}")
        self._rules.append("call: " + " | ".join(names))
        more = "" if shape.between is None or not self._answer.is_parallel else f" ({shape.between} call)*"
        self._rules.append(f"calls: {shape.begin} call{more} {shape.end}".rstrip())
        return "calls"


@dataclass(frozen=True, slots=True)
class _Shape:
    """How calls stand beside each other, in Lark."""

    call: Callable[[str, str], str]  # of the name and the rule of the arguments
    begin: str = ""
    between: str | None = None  # None: one call only
    end: str = ""


_MarkerWriter = Callable[[str], str]


def _hermes(marker: _MarkerWriter, is_bare: bool) -> _Shape:
    opening, closing = map(marker, HERMES_MARKERS)

    def call(name: str, arguments: str) -> str:
        return f"{opening} {_head(chr(10), name, 'arguments')} {arguments} {_literal('}' + chr(10))} {closing}"

    return _Shape(call, between=_literal("\n"))


def _llama(marker: _MarkerWriter, is_bare: bool) -> _Shape:
    return _Shape(lambda name, arguments: f'{_head("", name, "parameters")} {arguments} "}}"')


def _mistral(marker: _MarkerWriter, is_bare: bool) -> _Shape:
    all_calls, _, of_arguments = map(marker, MISTRAL_MARKERS)
    if is_bare:
        return _Shape(lambda name, rule: f"{all_calls} {_literal(name)} {of_arguments} {rule}", between="")
    return _Shape(
        lambda name, rule: f'{_head("", name, "arguments")} {rule} "}}"',
        begin=f'{all_calls} /\\x20?/ "["',
        between='", "',
        end='"]"',
    )


def _deepseek(marker: _MarkerWriter, is_bare: bool) -> _Shape:
    all_begin, begin, separator, end, all_end = map(marker, DEEPSEEK_MARKERS)

    def call(name: str, arguments: str) -> str:
        if is_bare:
            return f"{begin} {_literal(name)} {separator} {arguments} {end}"
        head, tail = _literal(f"{name}\n```json\n"), _literal("\n```")
        return f'{begin} "function" {separator} {head} {arguments} {tail} {end}'

    return _Shape(call, all_begin, "" if is_bare else _literal("\n"), all_end)


def _harmony(marker: _MarkerWriter, is_bare: bool) -> _Shape:
    def call(name: str, arguments: str) -> str:
        header = _literal(f"commentary to=functions.{name} ")
        return f'{marker(_CHANNEL)} {header} {marker(_CONSTRAIN)} "json" {marker(_MESSAGE)} {arguments}'

    return _Shape(call)


_SHAPES: Mapping[str, Callable[[_MarkerWriter, bool], _Shape]] = {
    HERMES.name: _hermes,
    LLAMA.name: _llama,
    MISTRAL.name: _mistral,
    DEEPSEEK.name: _deepseek,
    HARMONY.name: _harmony,
}


def _head(before: str, name: str, key: str) -> str:
    return _literal(f'{before}{{"name": "{name}", "{key}": ')


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _text_without(marker: str, times: str = "*") -> str:
    escaped = re.escape(marker).replace("/", r"\/")
    return f"/(?s:.{times})/ & ~/(?s:.*){escaped}(?s:.*)/"


def _call_schema(name: str, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a whole call; definitions stay at the root, where references look for them."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties = {"name": {"const": name}, "parameters": schema}
    return {
        **definitions,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _guided(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": JSON_OPTIONS})


def _can_be_embedded(form: Grammar) -> bool:
    if form.kind is not GrammarKind.JSON_SCHEMA:
        return form.kind is not GrammarKind.GBNF and (bool(form.source) or (bool(form.choices) and all(form.choices)))
    try:
        return isinstance(json.loads(form.source), dict | bool)
    except (ValueError, RecursionError):
        return False


def _embedded(form: Grammar) -> str:
    """A form as a part of another one."""
    if form.kind is GrammarKind.JSON_SCHEMA:
        schema = json.loads(form.source)
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return f"%json {_guided(schema)}"
    if form.kind is GrammarKind.CHOICE:
        return " | ".join(map(_literal, form.choices))
    if form.kind is GrammarKind.REGEX:
        return "/" + re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", form.source).replace("\n", r"\n") + "/"
    return "%lark {\n" + form.source + "\n}"
