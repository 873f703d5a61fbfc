"""Calls written as JSON objects: after a marker (Qwen, Hermes), or where the answer begins (Llama 3)."""

from __future__ import annotations

from router.parsers.call_object import CallObject, Reading
from router.parsers.deltas import DeltaBuffer

HERMES_MARKERS = ("<tool_call>", "</tool_call>")
LLAMA_MARKERS = ("<|python_tag|>",)


class HermesGrammar:
    """<tool_call>{"name": "f", "arguments": {...}}</tool_call>, once for each call, anywhere."""

    is_reasoning = False

    def __init__(self, out: DeltaBuffer) -> None:
        self._out = out
        self._call: CallObject | None = None
        self._is_closing = False  # after an object: spaces are left out
        self._is_unclosed = False  # a call was shown, and its closing marker is still to come

    def text(self, text: str) -> None:
        """As Grammar."""
        for at, character in enumerate(text):
            if self._out.is_done:
                return
            if self._is_closing and character.isspace():
                continue
            if self._call is None:
                self._is_closing = False
                self._out.content(text[at:])
                return
            self._push(self._call, character)

    def marker(self, marker: str) -> None:
        """As Grammar."""
        if self._call is not None and self._call.is_in_string and marker not in self._out.options.hidden:
            self.text(marker)
            return
        is_expected, self._is_unclosed = self._is_unclosed, False
        self._give_up()
        self._is_closing = False
        if marker == HERMES_MARKERS[0]:
            self._call = CallObject(self._out)
        elif not is_expected:
            self._out.marker(marker)

    def end(self) -> None:
        """As Grammar."""
        self._give_up()

    def _push(self, call: CallObject, character: str) -> None:
        call.push(character)
        self._is_unclosed = call.has_started
        if call.reading is Reading.DONE:
            self._call, self._is_closing = None, True
        elif call.reading is Reading.BROKEN:
            is_used = not call.has_started
            self._give_up()
            if not is_used:
                self._out.content(character)

    def _give_up(self) -> None:
        """A call that is not complete: content, but for what was shown as a call."""
        call, self._call = self._call, None
        if call is not None and not call.has_started:
            self._out.marker(HERMES_MARKERS[0])
            self._out.content(call.raw)


class LlamaGrammar:
    """{"name": "f", "parameters": {...}}, with <|python_tag|> before it or where the answer begins; more after ";"."""

    is_reasoning = False

    def __init__(self, out: DeltaBuffer) -> None:
        self._out = out
        self._call: CallObject | None = None
        self._held = ""  # what came since the answer's start, the marker or the last call: spaces and semicolons
        self._may_call = True

    def text(self, text: str) -> None:
        """As Grammar."""
        for at, character in enumerate(text):
            if self._out.is_done:
                return
            if self._call is not None:
                self._push(self._call, character)
            elif not self._may_call:
                self._out.content(text[at:])
                return
            elif character == "{":
                self._call = CallObject(self._out)
                self._push(self._call, character)
            elif character.isspace() or (character == ";" and self._out.num_calls):
                self._held += character
            else:
                self._give_up()
                self._out.content(character)

    def marker(self, marker: str) -> None:
        """As Grammar."""
        if self._call is not None and self._call.is_in_string and marker not in self._out.options.hidden:
            self.text(marker)
            return
        self._give_up()
        self._may_call = True
        if marker not in self._out.options.hidden:
            self._held = marker

    def end(self) -> None:
        """As Grammar."""
        if self._call is None and self._out.num_calls and not self._held.strip(" \t\r\n;"):
            self._held = ""
        self._give_up()

    def _push(self, call: CallObject, character: str) -> None:
        call.push(character)
        if call.reading is Reading.DONE:
            self._call, self._held = None, ""
        elif call.reading is Reading.BROKEN:
            is_used = not call.has_started
            self._give_up()
            if not is_used:
                self._out.content(character)
        elif call.has_started:
            self._held = ""

    def _give_up(self) -> None:
        """No call came, or one that is not complete: content."""
        call, self._call, held, self._held = self._call, None, self._held, ""
        self._may_call = False
        if held:
            self._out.content(held)
        if call is not None and not call.has_started:
            self._out.content(call.raw)
