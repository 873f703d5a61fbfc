"""The grammars of forced and strict calls, compiled by llguidance: what they take is read as calls, and no more."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import AddedToken, Tokenizer

from grammars.compiler import GrammarCompiler
from grammars.errors import GrammarError
from grammars.grammar import Grammar, GrammarKind
from router.parsers.deltas import CallArguments, CallStart, Content, Reasoning
from router.parsers.families import DEEPSEEK, HARMONY, HERMES, LLAMA, MISTRAL, AnswerFormat, Family
from router.parsers.forms import Function, MarkerToken, Wanted, answer_form
from router.service.text import TextCodec

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo"
THINK = ("<think>", "</think>")
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 20}},
}
FUNCTIONS = (Function("f", None, CITY), Function("get_weather"))
STRICT = (Function("f", None, CITY, is_strict=True), Function("get_weather"))
BEGIN, CALL, SEP, END, ALL_END = DEEPSEEK.markers
ARGS = '{"city": "Köln"}'

FAMILIES = {
    "hermes": Family(HERMES),
    "hermes_think": Family(HERMES, THINK),
    "llama": Family(LLAMA),
    "mistral": Family(MISTRAL),
    "mistral_bare": Family(MISTRAL, ("[THINK]", "[/THINK]"), has_bare_calls=True),
    "deepseek": Family(DEEPSEEK, THINK),
    "deepseek_bare": Family(DEEPSEEK, THINK, has_bare_calls=True),
    "harmony": Family(HARMONY),
    "think": Family(None, THINK),
}
CALLS: dict[str, Callable[[str, str], str]] = {
    "hermes": lambda name, args: f'<tool_call>\n{{"name": "{name}", "arguments": {args}}}\n</tool_call>',
    "hermes_think": lambda name, args: f'<tool_call>\n{{"name": "{name}", "arguments": {args}}}\n</tool_call>',
    "llama": lambda name, args: f'{{"name": "{name}", "parameters": {args}}}',
    "mistral": lambda name, args: f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {args}}}]',
    "mistral_bare": lambda name, args: f"[TOOL_CALLS]{name}[ARGS]{args}",
    "deepseek": lambda name, args: f"{BEGIN}{CALL}function{SEP}{name}\n```json\n{args}\n```{END}{ALL_END}",
    "deepseek_bare": lambda name, args: f"{BEGIN}{CALL}{name}{SEP}{args}{END}{ALL_END}",
    "harmony": lambda name, args: f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{args}",
}
KINDS = ("special", "added", "text")


class Model:
    """A vocabulary in which all markers are special tokens, added tokens or no tokens."""

    def __init__(self, directory: Path, kind: str) -> None:
        tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        markers = dict.fromkeys(itertools.chain(*(family.markers for family in FAMILIES.values())))
        if kind != "text":
            added = [AddedToken(marker, special=kind == "special", normalized=False) for marker in markers]
            (tokenizer.add_special_tokens if kind == "special" else tokenizer.add_tokens)(added)
        path = directory / "tokenizer.json"
        tokenizer.save(str(path))
        self.codec = TextCodec(path)
        self._compiler = GrammarCompiler(path, tokenizer.get_vocab_size(), [0])
        ids = self.codec.added_tokens(markers)
        self.tokens = {marker: MarkerToken(i, self.codec.is_special(i)) for marker, i in ids.items()}

    def takes(self, grammar: Grammar, text: str) -> bool:
        """Whether the whole text has the form."""
        matcher = self._compiler.matcher(grammar)
        ids = self.codec.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def written(self, grammar: Grammar, rng: random.Random) -> str:
        """A text of this form, of tokens chosen by chance, markers more often than others."""
        matcher = self._compiler.matcher(grammar)
        markers = {token.token_id for token in self.tokens.values()}
        ids: list[int] = []
        while not matcher.is_accepting() or rng.random() < 0.5:
            mask = matcher.compute_bitmask()
            allowed = [i for i in range(1, 8 * len(mask)) if mask[i // 8] >> (i % 8) & 1]
            if not allowed:
                break
            marked = [i for i in allowed if i in markers]
            ids.append(rng.choice(marked if marked and rng.random() < 0.4 else allowed))
            assert matcher.consume_token(ids[-1])
            assert len(ids) < 3000
        return self.codec.spelled(ids)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {kind: Model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def form(model: Model, family: str, wanted: Wanted, **options: bool) -> Grammar:
    grammar = answer_form(answer_format(family, wanted, **options), wanted, model.tokens)
    assert grammar is not None
    return grammar


def answer_format(family: str, wanted: Wanted, **options: bool) -> AnswerFormat:
    return AnswerFormat(FAMILIES[family], frozenset(function.name for function in wanted.functions), **options)


def read(family: str, wanted: Wanted, text: str, **options: bool) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning and calls of a text."""
    parser = answer_format(family, wanted, **options).parser("s", ())
    content, reasoning, calls = "", "", list[tuple[str, str]]()
    for delta in (*parser.push(text), *parser.finish()):
        match delta:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case CallStart(_, _, name):
                calls.append((name, ""))
            case CallArguments(_, text):
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return content, reasoning, calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CALLS)
def test_a_required_call_is_all_that_is_taken(models: dict[str, Model], family: str, kind: str) -> None:
    model, call = models[kind], CALLS[family]
    wanted = Wanted(FUNCTIONS, is_required=True)
    grammar = form(model, family, wanted)
    for name, args in (("f", ARGS), ("get_weather", "{}")):
        assert model.takes(grammar, call(name, args)), model.codec.encode(call(name, args), False)
        assert read(family, wanted, call(name, args)) == ("", "", [(name, args)])
    for name, args in (("f", "{}"), ("f", '{"city": 5}'), ("g", ARGS), ("get_weather", ARGS), ("f", "[]")):
        assert not model.takes(grammar, call(name, args))
    for text in ("", "Hello.", "x" + call("f", ARGS), call("f", ARGS) + " x"):
        assert not model.takes(grammar, text)
    named = form(model, family, Wanted(FUNCTIONS[1:], is_required=True))
    assert model.takes(named, call("get_weather", "{}"))
    assert not model.takes(named, call("f", ARGS))


@pytest.mark.parametrize("family", ["hermes_think", "mistral_bare", "deepseek"])
@pytest.mark.parametrize("kind", KINDS)
def test_reasoning_comes_before_a_required_call(models: dict[str, Model], family: str, kind: str) -> None:
    model, call = models[kind], CALLS[family]("f", ARGS)
    opening, closing = FAMILIES[family].reasoning or ("", "")
    wanted = Wanted(FUNCTIONS, is_required=True)
    text = f"{opening}\nWhere? {{<br/>\n{closing}\n\n{call}"
    assert model.takes(form(model, family, wanted), text)
    assert read(family, wanted, text) == ("", "Where? {<br/>", [("f", ARGS)])
    opened = form(model, family, wanted, starts_in_reasoning=True)
    assert model.takes(opened, text.removeprefix(opening))
    assert not model.takes(opened, call)


def test_the_analysis_comes_before_a_required_call(models: dict[str, Model]) -> None:
    wanted = Wanted(FUNCTIONS, is_required=True)
    grammar = form(models["special"], "harmony", wanted)
    analysis = "<|channel|>analysis<|message|>Where?<|end|><|start|>assistant"
    text = analysis + CALLS["harmony"]("f", ARGS)
    assert models["special"].takes(grammar, text)
    assert read("harmony", wanted, text) == ("", "Where?", [("f", ARGS)])
    assert not models["special"].takes(grammar, analysis + "<|channel|>final<|message|>There.")


@pytest.mark.parametrize(
    ("family", "between"),
    [("hermes", "\n"), ("mistral_bare", ""), ("deepseek_bare", ""), ("llama", "; "), ("harmony", "<|start|>assistant")],
)
def test_several_calls_where_the_family_has_them(models: dict[str, Model], family: str, between: str) -> None:
    one = CALLS[family]("f", ARGS).removeprefix(BEGIN).removesuffix(ALL_END)
    text = one + between + one
    text = BEGIN + text + ALL_END if family == "deepseek_bare" else text
    wanted = Wanted(FUNCTIONS, is_required=True)
    model, has_several = models["special"], family not in ("llama", "harmony")
    assert model.takes(form(model, family, wanted), text) is has_several
    assert not model.takes(form(model, family, wanted, is_parallel=False), text)
    if has_several:
        assert read(family, wanted, text)[2] == [("f", ARGS)] * 2


@pytest.mark.parametrize("kind", ["special", "added"])
@pytest.mark.parametrize("family", CALLS)
def test_strict_functions_leave_content_and_hold_calls(models: dict[str, Model], family: str, kind: str) -> None:
    model, call = models[kind], CALLS[family]
    grammar = form(model, family, Wanted(STRICT))
    said = "<|channel|>final<|message|>Well {a}." if family == "harmony" else "Well {a}.\n"
    assert model.takes(grammar, said)
    assert model.takes(grammar, call("f", ARGS))
    assert model.takes(grammar, call("get_weather", '{"anything": 1}')), "it is not strict"
    assert not model.takes(grammar, call("f", '{"city": 5}'))
    if family not in ("harmony", "llama"):
        assert model.takes(grammar, said + call("f", ARGS))
        assert not model.takes(grammar, said + call("f", "{}"))


def test_functions_that_are_not_strict_hold_nothing(models: dict[str, Model]) -> None:
    for family in CALLS:
        assert (
            answer_form(answer_format(family, Wanted(FUNCTIONS)), Wanted(FUNCTIONS), models["special"].tokens) is None
        )


CONTENT_FORMS = [
    (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "integer"}'), "12", "x"),
    (Grammar(GrammarKind.JSON_SCHEMA, "{}"), '{"a": [1]}', "{"),
    (Grammar(GrammarKind.REGEX, "a/b\\/[0-9]+"), "a/b/7", "a/b"),
    (Grammar.of_choices(("yes", 'no, "never"\n')), 'no, "never"\n', "maybe"),
    (Grammar(GrammarKind.LARK, 'start: "a" b\nb: /c+/'), "acc", "a"),
]


@pytest.mark.parametrize(("content", "good", "bad"), CONTENT_FORMS)
@pytest.mark.parametrize("family", ["hermes", "think", "harmony", "llama"])
def test_the_form_of_content_holds_behind_the_reasoning_and_beside_calls(
    models: dict[str, Model], family: str, content: Grammar, good: str, bad: str
) -> None:
    model = models["special"]
    head = "<|channel|>final<|message|>" if family == "harmony" else ""
    grammar = form(model, family, Wanted(content=content))
    assert model.takes(grammar, head + good)
    assert not model.takes(grammar, head + bad)
    if family == "think":
        assert model.takes(grammar, f"<think>\nHm.\n</think>\n\n{good}")
        opened = form(model, family, Wanted(content=content), starts_in_reasoning=True)
        assert model.takes(opened, f"Hm.</think>{good}")
        assert not model.takes(opened, good)
        return
    beside = form(model, family, Wanted(FUNCTIONS, content=content))
    assert model.takes(beside, head + good)
    assert model.takes(beside, CALLS[family]("f", ARGS))
    assert not model.takes(beside, head + bad)


@pytest.mark.parametrize("source", ["{", "[1]", ""])
def test_a_form_that_cannot_be_meant_is_left_to_the_compiler(models: dict[str, Model], source: str) -> None:
    content = Grammar(GrammarKind.JSON_SCHEMA, source)
    grammar = form(models["special"], "think", Wanted(content=content))
    with pytest.raises(GrammarError):
        models["special"].takes(grammar, "x")


def test_a_schema_that_cannot_be_held_is_an_error_of_the_compiler(models: dict[str, Model]) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"x": {"$ref": "#/$defs/missing"}}}
    wanted = Wanted((Function("f", None, json.loads(json.dumps(schema))),), is_required=True)
    with pytest.raises(GrammarError):
        models["special"].takes(form(models["special"], "hermes", wanted), "x")


@pytest.mark.parametrize("kind", ["special", "added"])
@pytest.mark.parametrize("family", CALLS)
@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_form_allows_is_read_as_calls_that_fit(
    models: dict[str, Model], family: str, kind: str, seed: int
) -> None:
    model, is_parallel = models[kind], bool(seed)
    properties = {"city": {"type": "string", "maxLength": 9}, "n": {"enum": [1, None, "x"]}}
    schema = {"type": "object", "properties": properties, "required": ["city"], "additionalProperties": False}
    wanted = Wanted((Function("f", None, schema), Function("get_weather")), is_required=True)
    text = model.written(form(model, family, wanted, is_parallel=is_parallel), random.Random(f"{family}{seed}"))
    content, _, calls = read(family, wanted, text, is_parallel=is_parallel)
    assert content == ""
    assert calls
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), schema if name == "f" else {"type": "object", "maxProperties": 0})
