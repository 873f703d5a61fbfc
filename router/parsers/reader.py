"""Reads an answer by a grammar: cuts the text at the grammar's markers and hands it the pieces.

Reasoning between two markers at an answer's start, as most families write it, is a grammar around another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from router.parsers.deltas import Delta, DeltaBuffer
from router.parsers.lexer import Lexer, Marker


class Grammar(Protocol):
    """One family's way to write answers. Says what it finds to a DeltaBuffer."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the text is inside of reasoning now."""
        ...

    def text(self, text: str) -> None:
        """Text without markers came; never empty."""
        ...

    def marker(self, marker: str) -> None:
        """One of the markers came."""
        ...

    def end(self) -> None:
        """The answer ended."""
        ...


class GrammarReader:
    """An AnswerParser."""

    def __init__(self, grammar: Grammar, markers: Sequence[str], out: DeltaBuffer) -> None:
        self._grammar = grammar
        self._lexer = Lexer(markers)
        self._out = out

    @property
    def is_reasoning(self) -> bool:
        """As AnswerParser."""
        return self._grammar.is_reasoning

    @property
    def is_done(self) -> bool:
        """As AnswerParser."""
        return self._out.is_done

    def push(self, text: str) -> Sequence[Delta]:
        """As AnswerParser."""
        for piece in self._lexer.push(text):
            if isinstance(piece, Marker):
                if not self._out.is_done:
                    self._grammar.marker(piece.text)
            else:
                self._text(piece)
        return self._out.take()

    def finish(self) -> Sequence[Delta]:
        """As AnswerParser."""
        self._text(self._lexer.finish())
        if not self._out.is_done:
            self._grammar.end()
        self._out.finish()
        return self._out.take()

    def _text(self, text: str) -> None:
        if text and not self._out.is_done:
            self._grammar.text(text)


class PlainGrammar:
    """All is content, but for markers that are special tokens."""

    is_reasoning = False

    def __init__(self, out: DeltaBuffer) -> None:
        self._out = out

    def text(self, text: str) -> None:
        """As Grammar."""
        self._out.content(text)

    def marker(self, marker: str) -> None:
        """As Grammar."""
        self._out.marker(marker)

    def end(self) -> None:
        """As Grammar."""


class ThinkGrammar:
    """Reasoning between two markers where the answer begins; what follows is for another grammar.

    Line breaks inside of the markers and after them are left out, as chat templates do when they write a message.
    """

    def __init__(self, markers: tuple[str, str], then: Grammar, out: DeltaBuffer) -> None:
        self._opening, self._closing = markers
        self._then = then
        self._out = out
        self._is_before = not out.options.starts_in_reasoning
        self.is_reasoning = not self._is_before
        self._has_reasoned = self.is_reasoning
        self._has_text = False  # of the reasoning, or of what follows it
        self._held = ""  # spaces before it all, or line breaks that may be the reasoning's last ones

    def text(self, text: str) -> None:
        """As Grammar."""
        if self.is_reasoning:
            self._reason(text)
            return
        if self._is_before:
            text = self._held + text
            self._is_before = not text.strip()
            self._held = text if self._is_before else ""
            if self._is_before:
                return
        elif self._has_reasoned and not self._has_text:
            text = text.lstrip("\n")
            self._has_text = bool(text)
        if text:
            self._then.text(text)

    def marker(self, marker: str) -> None:
        """As Grammar."""
        if self._is_before and marker == self._opening:
            self._is_before, self._held = False, ""
            self.is_reasoning = self._has_reasoned = True
        elif self.is_reasoning:
            self._marker_in_reasoning(marker)
        else:
            self._release()
            self._has_text = True
            self._then.marker(marker)

    def end(self) -> None:
        """As Grammar."""
        if not self.is_reasoning:
            self._release()
        self._then.end()

    def _release(self) -> None:
        """What came first was no reasoning."""
        held, self._held, self._is_before = self._held, "", False
        if held:
            self._then.text(held)

    def _reason(self, text: str) -> None:
        text = self._held + text
        if not self._has_text:
            text = text.lstrip("\n")
            self._has_text = bool(text)
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        self._out.reasoning(shown)

    def _marker_in_reasoning(self, marker: str) -> None:
        if marker == self._closing:
            self.is_reasoning, self._has_text, self._held = False, False, ""
        elif marker not in self._out.options.hidden and (marker != self._opening or self._has_text):
            self._reason(marker)
