"""Compiles grammars against one model's tokenizer, with llguidance; every engine step then asks a matcher for a mask.

Bounds what a grammar may cost: its text, and by llguidance's own limits its symbols, lexer states and the work of a
step. A compiled grammar is kept for the next request that has it. From any thread.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from grammars.errors import GrammarError
from grammars.grammar import JSON_OPTIONS, Grammar, GrammarKind

if TYPE_CHECKING:  # imported when the first grammar comes: an engine measured alone runs without it
    import llguidance

MAX_SOURCE_BYTES = 128 << 10
MAX_CHOICES = 4096
_MAX_KEPT = 32  # a large one takes some 30 MiB, see _limits
_SPECIAL = frozenset(r"\.+*?()|[]{}^$#&-~/")
_HARMLESS_WARNING = "Unknown format: "  # by JSON Schema's own rules a format that is not known says nothing
_MAX_SHOWN = 300  # characters of an error
# llguidance follows references by recursion, and a stack that overflows ends the process. 128 KiB of rules that refer
# to each other in a chain take some 60 MiB. What is not used of a stack costs nothing.
_STACK_BYTES = 512 << 20
_stack_size = threading.Lock()  # it is a setting of the process


def _limits() -> llguidance.LLParserLimits:
    """Of one grammar. Compiling nested repetitions uses up the initial fuel: ((a{1000}){1000}){50} took 0.1 s and 30
    MiB, and 165 MiB with five times the fuel, which none of 728 schemas needs. By llguidance's own figures a step takes
    15 ms of lexing and 3 ms of parsing at most, and 50,000 lexer states 1 to 2 kB each."""
    import llguidance

    return llguidance.LLParserLimits(
        max_items_in_row=20_000,
        initial_lexer_fuel=200_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,  # a message must not carry one tenant's text to another's log
    )


class GrammarCompiler:
    """One model's tokenizer, read when the first grammar comes."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """tokenizer_file: tokenizer.json. vocab_size: of the logits; ids past the tokenizer's are never allowed."""
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._reading = threading.Lock()

    def matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        """A matcher at the start of a completion, the caller's own. Raises GrammarError when it cannot be compiled."""
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = _on_a_deep_stack(lambda: self._compile(grammar))  # without the lock: nobody else waits for it
        with self._lock:
            compiled = self._compiled.setdefault(grammar, compiled)
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
            return compiled.deep_copy()

    @property
    def special_end_ids(self) -> Sequence[int]:
        """The ids that matchers allow where a completion may end."""
        return self._read().eos_tokens

    def _read(self) -> llguidance.LLTokenizer:
        with self._reading:
            return self._tokenizer or self._load()

    def _load(self) -> llguidance.LLTokenizer:
        if not self._file.is_file():
            raise GrammarError(f"structured output needs the model's {self._file.name}, and it has none")
        import llguidance

        eos = [i for i in self._eos if i < self._vocab_size] or None
        try:
            self._tokenizer = llguidance.LLTokenizer(str(self._file), n_vocab=self._vocab_size, eos_token=eos)
        except Exception as error:  # what the Rust side raises has no common type
            raise GrammarError(f"structured output is not possible with this tokenizer: {_short(error)}") from None
        return self._tokenizer

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        import llguidance

        tokenizer = self._read()
        _check_size(grammar)
        matcher = llguidance.LLMatcher(tokenizer, _as_llguidance(grammar), limits=_limits(), log_level=0)
        if matcher.is_error():
            raise GrammarError(_short(matcher.get_error()))
        for warning in matcher.get_grammar_warnings():
            if not warning.startswith(_HARMLESS_WARNING):
                raise GrammarError(_short(warning))
        for _ in range(2):  # copies share a lexer: where the first mask used it up, the second one fails
            first = matcher.deep_copy()
            mask = first.compute_bitmask()
            if first.is_error() or not any(mask):
                raise GrammarError("no text has this form, or finding one is too much work")
        return matcher


def _check_size(grammar: Grammar) -> None:
    if len(grammar.choices) > MAX_CHOICES:
        raise GrammarError(f"at most {MAX_CHOICES} texts to choose from, not {len(grammar.choices)}")
    texts = grammar.choices if grammar.kind is GrammarKind.CHOICE else (grammar.source,)
    if not texts or not all(texts):
        raise GrammarError("must not be empty")
    try:
        num_bytes = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError:
        raise GrammarError("is not valid Unicode (it has a lone surrogate)") from None
    if num_bytes > MAX_SOURCE_BYTES:
        raise GrammarError(f"has {num_bytes} bytes, more than {MAX_SOURCE_BYTES}")


def _as_llguidance(grammar: Grammar) -> str:
    import llguidance
    from llguidance.gbnf_to_lark import gbnf_to_lark

    compiler = llguidance.LLMatcher
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            schema = _parsed_schema(grammar.source)
            try:
                return compiler.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
            except ValueError as error:
                raise GrammarError(_short(error)) from None
        case GrammarKind.REGEX:
            return compiler.grammar_from_regex(grammar.source)
        case GrammarKind.CHOICE:
            return compiler.grammar_from_regex("|".join(map(_escaped, grammar.choices)))  # thousands, where Lark fails
        case GrammarKind.LARK:
            return compiler.grammar_from_lark(grammar.source)
        case GrammarKind.GBNF:
            try:
                return compiler.grammar_from_lark(gbnf_to_lark(grammar.source))
            except Exception as error:  # the converter has errors of its own, and Python's of what it did not expect
                raise GrammarError(_short(error)) from None


def _parsed_schema(source: str) -> str:
    """The schema as it is written, when it is JSON and an object or a boolean."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"is no JSON: {_short(error)}") from None
    if schema is True:
        return "{}"
    if not isinstance(schema, dict):
        raise GrammarError("no text has this form" if schema is False else "a JSON schema is an object or a boolean")
    return source


def _escaped(text: str) -> str:
    """As a regular expression that matches nothing else (Rust's syntax)."""
    return "".join(f"\\{c}" if c in _SPECIAL else c for c in text)


def _on_a_deep_stack(compile_: Callable[[], llguidance.LLMatcher]) -> llguidance.LLMatcher:
    """Its result. Raises GrammarError."""
    found: Future[llguidance.LLMatcher] = Future()

    def run() -> None:
        try:
            found.set_result(compile_())
        except BaseException as error:
            found.set_exception(error)

    with _stack_size:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, name="compile grammar", daemon=True).start()
        except RuntimeError as error:  # no memory for one more thread
            raise GrammarError(f"cannot be compiled now: {error}") from None
        finally:
            threading.stack_size(before)
    return found.result()


def _short(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and line != "<non-verbose/>")
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
