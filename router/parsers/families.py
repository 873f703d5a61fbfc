"""Which way a model writes reasoning and tool calls, told from its chat template.

A template writes earlier calls and reasoning into the prompt as the model was trained to write them, so its source has
the markers. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

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

_FENCE = "```json"
_SHORT_ID = 9  # letters and digits, as Mistral's templates require
_LONG_ID = 24
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
    has_bare_calls: bool = False  # of a family with an older form: the name stands right before the arguments

    @property
    def markers(self) -> tuple[str, ...]:
        """All of them. None begins with another one."""
        return (*(self.calls.markers if self.calls is not None else ()), *(self.reasoning or ()))

    @property
    def is_plain(self) -> bool:
        """Whether all of an answer is content."""
        return self.calls is None and self.reasoning is None

    def after(self, prompt: str) -> Family:
        """How an answer to this prompt is written: without reasoning where the prompt has closed it."""
        is_closed = self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[1])
        return replace(self, reasoning=None) if is_closed else self

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
    reasoning = next((pair for pair in (MISTRAL_THINK, _THINK) if pair[1] in template), None)
    is_bare = (calls is MISTRAL and MISTRAL_MARKERS[2] in template) or (calls is DEEPSEEK and _FENCE not in template)
    return Family(calls, reasoning, is_bare)


def _calls_of(template: str) -> CallFormat | None:
    if "<|channel|>" in template and "<|message|>" in template:
        return HARMONY
    if DEEPSEEK_MARKERS[1] in template:
        return DEEPSEEK
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return HERMES
    has_parameters = '"parameters"' in template or "'parameters'" in template
    is_llama = "<|start_header_id|>" in template and has_parameters and "TOOLCALL" not in template
    return LLAMA if is_llama or "<|python_tag|>" in template else None


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How to read the answer to one request."""

    family: Family
    names: frozenset[str] = frozenset()  # of the functions that may be called; none: calls are content
    is_parallel: bool = True
    starts_in_reasoning: bool = False
    shows_content: bool = True  # as in ParserOptions

    @property
    def markers(self) -> tuple[str, ...]:
        """What the parser needs to see, also where these are special tokens. None begins with another one."""
        return self.family.markers if self._reads_calls else self.family.reasoning or ()

    def parser(self, stream_id: str, special_markers: Collection[str]) -> AnswerParser:
        """A fresh one. special_markers: those markers that are special tokens of the vocabulary."""
        options = ParserOptions(
            self._call_id(stream_id),
            self.names,
            frozenset(special_markers),
            self.is_parallel,
            self.starts_in_reasoning,
            self.shows_content,
        )
        out = DeltaBuffer(options)
        calls = self.family.calls if self._reads_calls else None
        grammar: Grammar = PlainGrammar(out) if calls is None else calls.grammar(out)
        if self.family.reasoning is not None:
            grammar = ThinkGrammar(self.family.reasoning, grammar, out)
        return GrammarReader(grammar, self.markers, out)

    def _call_id(self, stream_id: str) -> CallId:
        """Ids that a resumed stream repeats, and that the family's templates accept."""
        calls = self.family.calls
        length = _SHORT_ID if calls is not None and calls.has_short_ids else _LONG_ID

        def call_id(index: int) -> str:
            digest = hashlib.sha256(f"{stream_id}/{index}".encode()).hexdigest()[:length]
            return digest if length == _SHORT_ID else f"call_{digest}"

        return call_id

    @property
    def _reads_calls(self) -> bool:
        # harmony's channels are read in any case: content is one of them
        return bool(self.names) or self.family.calls is HARMONY
