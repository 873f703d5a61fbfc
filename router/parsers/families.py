"""Which way a model writes reasoning and tool calls, told from its chat template.

A template writes earlier calls and reasoning into the prompt as the model was trained to write them, so its source has
the markers. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from router.parsers.deltas import AnswerParser, CallId, DeltaBuffer, ParserOptions
from router.parsers.harmony import HARMONY_MARKERS, HarmonyGrammar
from router.parsers.json_calls import HERMES_MARKERS, LLAMA_MARKERS, HermesGrammar, LlamaGrammar
from router.parsers.named_calls import (
    DEEPSEEK_MARKERS,
    MISTRAL_MARKERS,
    MISTRAL_THINK,
    DeepSeekGrammar,
    MistralGrammar,
)
from router.parsers.reader import Grammar, GrammarReader, PlainGrammar, ThinkGrammar

_THINK = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a family writes calls."""

    name: str
    markers: tuple[str, ...]
    grammar: Callable[[DeltaBuffer], Grammar]
    has_short_ids: bool = False  # nine letters and digits


@dataclass(frozen=True, slots=True)
class Family:
    """How a model writes. None: it does not, or in a way that is not known here."""

    calls: CallFormat | None = None
    reasoning: tuple[str, str] | None = None  # the markers around it

    @property
    def is_plain(self) -> bool:
        """Whether all of an answer is content."""
        return self.calls is None and self.reasoning is None

    def starts_in_reasoning(self, prompt: str) -> bool:
        """Whether a prompt ends inside of reasoning."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[0])


HERMES = CallFormat("hermes", HERMES_MARKERS, HermesGrammar)
LLAMA = CallFormat("llama3", LLAMA_MARKERS, LlamaGrammar)
MISTRAL = CallFormat("mistral", MISTRAL_MARKERS, MistralGrammar, has_short_ids=True)
DEEPSEEK = CallFormat("deepseek", DEEPSEEK_MARKERS, DeepSeekGrammar)
HARMONY = CallFormat("harmony", HARMONY_MARKERS, HarmonyGrammar)


def family_of(template: str) -> Family:
    """The family of a chat template's source."""
    calls = _calls_of(template)
    if calls is HARMONY:  # a channel is its reasoning
        return Family(calls)
    return Family(calls, next((pair for pair in (MISTRAL_THINK, _THINK) if pair[1] in template), None))


def _calls_of(template: str) -> CallFormat | None:
    if "<|channel|>" in template and "<|message|>" in template:
        return HARMONY
    if DEEPSEEK_MARKERS[1] in template:
        return DEEPSEEK
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return HERMES
    is_llama = "<|start_header_id|>" in template and ('"parameters"' in template or "'parameters'" in template)
    return LLAMA if is_llama or "<|python_tag|>" in template else None


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How to read the answer to one request."""

    family: Family
    names: frozenset[str] = frozenset()  # of the functions that may be called; none: calls are content
    is_parallel: bool = True
    starts_in_reasoning: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """What the parser needs to see, also where these are special tokens. None begins with another one."""
        calls = self.family.calls if self._reads_calls else None
        return (*(calls.markers if calls is not None else ()), *(self.family.reasoning or ()))

    def parser(self, call_id: CallId, special_markers: Collection[str]) -> AnswerParser:
        """A fresh one. special_markers: those markers that are special tokens of the vocabulary."""
        options = ParserOptions(
            call_id, self.names, frozenset(special_markers), self.is_parallel, self.starts_in_reasoning
        )
        out = DeltaBuffer(options)
        calls = self.family.calls if self._reads_calls else None
        grammar: Grammar = PlainGrammar(out) if calls is None else calls.grammar(out)
        if self.family.reasoning is not None:
            grammar = ThinkGrammar(self.family.reasoning, grammar, out)
        return GrammarReader(grammar, self.markers, out)

    @property
    def _reads_calls(self) -> bool:
        # harmony's channels are read in any case: content is one of them
        return bool(self.names) or self.family.calls is HARMONY
