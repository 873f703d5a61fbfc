"""What an answer's text is made of: content, reasoning and tool calls, in the order in which they come.

Plain data, and the protocol of the parsers. Knows nothing of tokens or of OpenAI's JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

CallId = Callable[[int], str]
"""The id of an answer's call by its index. The same each time: a resumed stream must repeat it."""


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model writes before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins. index: 0 for the first of an answer."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Delta = Content | Reasoning | CallStart | CallArguments


@dataclass(frozen=True, slots=True)
class ParserOptions:
    """What a parser knows of the request and of the vocabulary."""

    call_id: CallId
    names: frozenset[str] = frozenset()  # of the functions that may be called; a call of another is content
    hidden: frozenset[str] = frozenset()  # markers that are special tokens: never shown, whatever they come to mean
    is_parallel: bool = True  # more than one call
    starts_in_reasoning: bool = False  # the prompt opened it
    shows_content: bool = True  # false where a call is required: other text is what stands around it, or a part of it


class AnswerParser(Protocol):
    """Reads one answer as it comes. What was given out depends on the text so far, not on how it was cut."""

    def push(self, text: str) -> Sequence[Delta]:
        """More text came: what is certain now."""
        ...

    def finish(self) -> Sequence[Delta]:
        """No more will come: what was held back."""
        ...

    @property
    def is_reasoning(self) -> bool:
        """Whether the text is inside of reasoning now."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether the one call that was asked for is complete, so that nothing more is wanted."""
        ...


@dataclass(slots=True)
class DeltaBuffer:
    """Collects deltas; joins neighbours of one kind. Holds back spaces after content: those before a call are dropped.

    A parser's output side: parsers say what a text is, and this decides whether it shows.
    """

    options: ParserOptions
    num_calls: int = 0
    num_done: int = 0
    _deltas: list[Delta] = field(default_factory=list)
    _held: str = ""
    _follows_call: bool = False  # nothing was said after the last call

    def content(self, text: str) -> None:
        """Text for the reader."""
        if not self.options.shows_content:
            return
        text = self._held + text
        shown = text.rstrip() if self.options.names else text
        self._held = text[len(shown) :]
        if shown:
            self._follows_call = False
            self._add(Content(shown))

    def reasoning(self, text: str) -> None:
        """Text of the reasoning."""
        if text:
            self._add(Reasoning(text))

    def start_call(self, name: str) -> None:
        """The next call."""
        self._held = ""
        self._follows_call = True
        self._add(CallStart(self.num_calls, self.options.call_id(self.num_calls), name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the last call's."""
        if text:
            self._add(CallArguments(self.num_calls - 1, text))

    def end_call(self) -> None:
        """The last call is complete."""
        self.num_done += 1

    def marker(self, marker: str) -> None:
        """A marker that turned out to mean nothing."""
        if marker not in self.options.hidden:
            self.content(marker)

    @property
    def is_done(self) -> bool:
        """As AnswerParser."""
        return not self.options.is_parallel and self.num_done > 0

    def finish(self) -> None:
        """Spaces that no call followed show."""
        if self._held and not self._follows_call:
            self._add(Content(self._held))
        self._held = ""

    def take(self) -> Sequence[Delta]:
        """What came since the last time."""
        taken, self._deltas = self._deltas, []
        return taken

    def _add(self, delta: Delta) -> None:
        last = self._deltas[-1] if self._deltas else None
        if isinstance(delta, Content) and isinstance(last, Content):
            self._deltas[-1] = Content(last.text + delta.text)
        elif isinstance(delta, Reasoning) and isinstance(last, Reasoning):
            self._deltas[-1] = Reasoning(last.text + delta.text)
        elif isinstance(delta, CallArguments) and isinstance(last, CallArguments) and last.index == delta.index:
            self._deltas[-1] = CallArguments(last.index, last.text + delta.text)
        else:
            self._deltas.append(delta)
