"""Grammars that compile, and those that are refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from grammars.compiler import MAX_CHOICES, MAX_SOURCE_BYTES, GrammarCompiler
from grammars.errors import GrammarError
from grammars.grammar import Grammar, GrammarKind
from router.service.text import TextCodec
from tests.fake_model import DEMO

VOCAB_SIZE = 4096
CODEC = TextCodec(DEMO / "tokenizer.json")


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(DEMO / "tokenizer.json", VOCAB_SIZE, [0])


def fits(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    matcher = compiler.matcher(grammar)
    token_ids = CODEC.encode(text, False)
    return matcher.try_consume_tokens(list(token_ids)) == len(token_ids) and matcher.is_accepting()


ANY_JSON = Grammar(GrammarKind.JSON_SCHEMA, "{}")
ARITHMETIC = Grammar(GrammarKind.GBNF, 'root ::= number ("+" number)*\nnumber ::= [0-9]+\n')
GREETING = Grammar(GrammarKind.LARK, 'start: greeting " " NAME\ngreeting: "hello" | "bye"\nNAME: /[A-Z][a-z]+/\n')


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "integer", "minimum": 3}'), "17", "2"),
        (ANY_JSON, '{"a": [1, null, "\u00e9"]}', "{'a': 1}"),
        (Grammar(GrammarKind.REGEX, "(ab)+c"), "ababc", "abab"),
        (Grammar.of_choices(["yes", 'no "way"']), 'no "way"', "no"),
        (ARITHMETIC, "1+22+3", "1+"),
        (GREETING, "bye Ada", "bye ada"),
    ],
)
def test_each_kind(compiler: GrammarCompiler, grammar: Grammar, right: str, wrong: str) -> None:
    assert fits(compiler, grammar, right)
    assert not fits(compiler, grammar, wrong)
    assert Grammar.of(grammar.message()) == grammar


@pytest.mark.parametrize("dumps", [{}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}], ids=str)
def test_json_has_the_white_space_of_common_writers(compiler: GrammarCompiler, dumps: dict[str, object]) -> None:
    assert fits(compiler, ANY_JSON, json.dumps({"a": [1, {"b": None}], "c": {}}, **dumps))


@pytest.mark.parametrize("between", ["  ", "\n\n", " \n", "\n" + 33 * " "], ids=repr)
def test_white_space_does_not_go_on_and_on(compiler: GrammarCompiler, between: str) -> None:
    assert not fits(compiler, ANY_JSON, f'{{"a":{between}1}}')


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar(GrammarKind.JSON_SCHEMA, '{"not": {"type": "null"}}'), '"not"'),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"oneOf": [{"minimum": 1}, {"maximum": 2}]}'), "oneOf"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "colour"}'), "Invalid type: colour"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "http://schemas.example/x"}'), "schemas.example"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#/$defs/none"}'), "does not exist"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#"}'), "no text has this form"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"enum": []}'), "Unsatisfiable"),
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "is no JSON"),
        (Grammar(GrammarKind.JSON_SCHEMA, "[1]"), "an object or a boolean"),
        (Grammar(GrammarKind.JSON_SCHEMA, "false"), "no text has this form"),
        (Grammar(GrammarKind.JSON_SCHEMA, nested(5000)), ""),
        (Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"const": "x" * MAX_SOURCE_BYTES})), "bytes, more than"),
        (Grammar(GrammarKind.REGEX, "(unclosed"), "unclosed group"),
        (Grammar(GrammarKind.REGEX, r"(?=a)b"), "look-around"),
        (Grammar(GrammarKind.LARK, "start: missing"), "missing"),
        (Grammar(GrammarKind.GBNF, "root ::= missing"), "missing"),
        (Grammar(GrammarKind.GBNF, 'root ::= "open'), ""),
        (Grammar.of_choices([]), "must not be empty"),
        (Grammar.of_choices(["a", ""]), "must not be empty"),
        (Grammar.of_choices([str(i) for i in range(MAX_CHOICES + 1)]), f"at most {MAX_CHOICES}"),
        (Grammar(GrammarKind.REGEX, ""), "must not be empty"),
        (Grammar(GrammarKind.REGEX, "\ud800"), "lone surrogate"),
        (Grammar.of_choices(["a", "\ud800"]), "lone surrogate"),
    ],
)
def test_what_cannot_be_held_to_is_refused(compiler: GrammarCompiler, grammar: Grammar, reason: str) -> None:
    with pytest.raises(GrammarError) as refusal:
        compiler.matcher(grammar)
    assert reason in str(refusal.value)
    assert 0 < len(str(refusal.value)) < 400
    assert fits(compiler, ANY_JSON, "[]")


def chain_of_schemas(length: int) -> str:
    defs = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return json.dumps({"$defs": {**defs, f"d{length}": {"type": "integer"}}, "$ref": "#/$defs/d0"})


def chain_of_rules(length: int, assign: str, first: str) -> str:
    rules = [f"r{i} {assign} r{i + 1}" for i in range(length)]
    return "\n".join([f"{first} {assign} r0", *rules, f'r{length} {assign} "x"', ""])


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(GrammarKind.JSON_SCHEMA, chain_of_schemas(2000)),
        Grammar(GrammarKind.LARK, chain_of_rules(8000, ":", "start")),
    ],
    ids=["schema", "lark"],
)
def test_long_chains_of_references_do_not_end_the_process(compiler: GrammarCompiler, grammar: Grammar) -> None:
    assert len(grammar.source) > MAX_SOURCE_BYTES - 32768
    assert not compiler.matcher(grammar).is_error()


def test_nested_repetitions_are_refused_and_take_little_memory(compiler: GrammarCompiler) -> None:
    assert fits(compiler, Grammar(GrammarKind.REGEX, "(a{1000}){5}"), "a" * 5000)
    before = psutil.Process().memory_info().rss
    for letter in "abcd":
        with pytest.raises(GrammarError, match="too much work"):
            compiler.matcher(Grammar(GrammarKind.REGEX, f"(({letter}{{1000}}){{1000}}){{50}}"))
    assert psutil.Process().memory_info().rss - before < 300 << 20  # each took 165 MiB once, and kept it


def test_thousands_of_alternatives(compiler: GrammarCompiler) -> None:
    texts = [f"v{i}" for i in range(MAX_CHOICES)]
    assert fits(compiler, Grammar.of_choices(texts), "v4095")
    assert not fits(compiler, Grammar.of_choices(texts), "v4096")
    special = r"a.b*c|d(e)[f]{g}^$\/-&~#"
    assert fits(compiler, Grammar.of_choices([special, "line\nbreak", "\u00e9"]), special)
    assert fits(compiler, Grammar.of_choices([special, "line\nbreak", "\u00e9"]), "line\nbreak")
    rules = "start: " + " | ".join(f'"w{i}"' for i in range(2000))
    assert fits(compiler, Grammar(GrammarKind.LARK, rules), "w1999")
    many = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(800)}}
    assert fits(compiler, Grammar(GrammarKind.JSON_SCHEMA, json.dumps(many)), '{"p799": 1}')


def test_an_unknown_format_says_nothing(compiler: GrammarCompiler) -> None:
    """So JSON Schema has it; a format that is known is held to."""
    assert fits(compiler, Grammar(GrammarKind.JSON_SCHEMA, '{"type": "string", "format": "colour"}'), '"any"')
    assert not fits(compiler, Grammar(GrammarKind.JSON_SCHEMA, '{"type": "string", "format": "date"}'), '"any"')


def test_white_space_comes_to_an_end(compiler: GrammarCompiler) -> None:
    grammar = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "array", "items": {"type": "integer"}, "minItems": 1}')
    assert fits(compiler, grammar, "[\n  1,\n  2\n]")
    assert not fits(compiler, grammar, "[" + "\n" * 40 + "1]")


def test_a_model_without_a_tokenizer_file_says_so(tmp_path: Path) -> None:
    compiler = GrammarCompiler(tmp_path / "tokenizer.json", VOCAB_SIZE, [0])
    with pytest.raises(GrammarError, match=r"needs the model's tokenizer\.json"):
        compiler.matcher(ANY_JSON)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GrammarError, match="not possible with this tokenizer"):
        compiler.matcher(ANY_JSON)
