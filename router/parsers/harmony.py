"""gpt-oss' way to write answers ("harmony"): messages with a header, each for a channel and perhaps for a function.

<|start|>assistant<|channel|>analysis<|message|>...<|end|> is reasoning, the channel final is content, and
commentary to=functions.f <|constrain|>json<|message|>{...}<|call|> is a call. The prompt ends with the first
<|start|>assistant.
"""

from __future__ import annotations

import enum
import re

from router.parsers.call_object import Arguments, Reading
from router.parsers.deltas import DeltaBuffer

HARMONY_MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_START, _CHANNEL, _CONSTRAIN, _MESSAGE, _END, _CALL, _RETURN = HARMONY_MARKERS
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL_NAME = re.compile(re.escape(_CHANNEL) + r"\s*([^\s<]*)")
_FUNCTIONS = "functions."
_TO = " to="


class _Part(enum.Enum):
    HEADER = "header"
    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"


class HarmonyGrammar:
    """As Grammar. What has no header at all is content."""

    def __init__(self, out: DeltaBuffer) -> None:
        self._out = out
        self._part = _Part.HEADER
        self._header = ""
        self._name = ""  # of the function that the message is for
        self._arguments: Arguments | None = None
        self._held = ""  # spaces before a call's arguments
        self._seen: set[_Part] = set()  # kinds of messages that had text
        self._is_first = True  # of this message's text

    @property
    def is_reasoning(self) -> bool:
        """Whether a message of the analysis is open."""
        return self._part is _Part.REASONING

    def text(self, text: str) -> None:
        """As Grammar."""
        if self._part is _Part.HEADER:
            self._push_header(text)
        elif self._part is _Part.CALL:
            self._push_call(text)
        else:
            self._show(self._part, text)

    def marker(self, marker: str) -> None:
        """As Grammar."""
        if self._arguments is not None and self._arguments.is_in_string and marker not in self._out.options.hidden:
            self.text(marker)
        elif self._part is _Part.HEADER and marker in (_CHANNEL, _CONSTRAIN):
            self._header += marker
        elif self._part is _Part.HEADER and marker == _MESSAGE:
            self._open()
        else:
            self._close()
            if marker in (_START, _CHANNEL):
                self._part, self._header = _Part.HEADER, marker

    def end(self) -> None:
        """As Grammar."""
        if self._part is _Part.HEADER and self._header and "<|" not in self._header:
            self._show(_Part.CONTENT, self._header)

    def _push_header(self, text: str) -> None:
        self._header += text
        # The first message's header may go on with a recipient; any other text there is an answer without a header.
        if not (self._header.startswith(("<|", _TO)) or _TO.startswith(self._header)):
            text, self._header, self._part = self._header, "", _Part.CONTENT
            self._is_first = True
            self._show(self._part, text)

    def _open(self) -> None:
        """The header is complete."""
        header, self._header = self._header, ""
        recipient, channel = _RECIPIENT.search(header), _CHANNEL_NAME.search(header)
        self._is_first = True
        if recipient is not None and recipient[1].startswith(_FUNCTIONS):
            self._part, self._name = _Part.CALL, recipient[1].removeprefix(_FUNCTIONS)
            if self._name not in self._out.options.names:
                self._part = _Part.CONTENT
        else:
            is_analysis = channel is not None and channel[1] == "analysis"
            self._part = _Part.REASONING if is_analysis else _Part.CONTENT

    def _close(self) -> None:
        """The message ended; what comes before another header is content."""
        if self._part is _Part.CALL and self._arguments is None:  # nothing was written: no arguments
            self._out.start_call(self._name)
            self._out.arguments("{}")
            self._out.end_call()
        self._arguments, self._part, self._header, self._held = None, _Part.CONTENT, "", ""
        self._is_first = True

    def _show(self, part: _Part, text: str) -> None:
        """Text of a message; messages of one kind are parted by a line break."""
        say = self._out.reasoning if part is _Part.REASONING else self._out.content
        say("\n" + text if self._is_first and part in self._seen else text)
        self._seen.add(part)
        self._is_first = False

    def _push_call(self, text: str) -> None:
        for at, character in enumerate(text):
            if self._out.is_done:
                return
            if self._arguments is None:
                if character.isspace():
                    self._held += character
                    continue
                if character == "{":
                    self._out.start_call(self._name)
                    self._arguments = Arguments(self._out)
            if not self._takes(character):
                self._part, self._arguments = _Part.CONTENT, None
                self._show(self._part, self._held + text[at:])
                return
            self._held = ""

    def _takes(self, character: str) -> bool:
        """Whether it belongs to a call that has started."""
        if self._arguments is None:
            return False
        if self._arguments.reading is Reading.DONE:
            return character.isspace()
        self._arguments.push(character)
        return self._arguments.reading is not Reading.BROKEN
