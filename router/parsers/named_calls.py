"""Calls whose name stands before the arguments, between markers: Mistral's and DeepSeek's."""

from __future__ import annotations

from router.parsers.call_object import Arguments, CallObject, Reading
from router.parsers.deltas import DeltaBuffer

MISTRAL_MARKERS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
MISTRAL_THINK = ("[THINK]", "[/THINK]")
_CALLS, _CALL_ID, _ARGS = MISTRAL_MARKERS

DEEPSEEK_MARKERS = tuple(
    f"<\uff5ctool\u2581{word}\uff5c>"  # a bar and an underline of their own
    for word in ("calls\u2581begin", "call\u2581begin", "sep", "call\u2581end", "calls\u2581end")
)
_ALL_BEGIN, _BEGIN, _SEPARATOR, _END, _ALL_END = DEEPSEEK_MARKERS
_FENCE = "```json\n"
_SPACES = " \t\r\n"


class NamedCall:
    """One call whose name, then arguments come. Until it has started, `raw` is what must become content."""

    def __init__(self, out: DeltaBuffer, marker: str) -> None:
        self._out = out
        self._markers_and_text: list[tuple[bool, str]] = [(True, marker)]
        self.header = ""  # the text before the arguments, since the last marker
        self._arguments: Arguments | None = None

    @property
    def has_started(self) -> bool:
        """Whether the call was shown."""
        return self._arguments is not None

    @property
    def reading(self) -> Reading:
        """Of the arguments."""
        return Reading.OPEN if self._arguments is None else self._arguments.reading

    @property
    def is_in_string(self) -> bool:
        """Whether a marker would be part of a string now."""
        return self._arguments is not None and self._arguments.is_in_string

    def note(self, text: str, is_marker: bool = False) -> None:
        """Text before the arguments, or a marker."""
        self._markers_and_text.append((is_marker, text))
        self.header = "" if is_marker else self.header + text

    def start(self, name: str) -> bool:
        """Whether there is such a function; its arguments follow."""
        if name not in self._out.options.names:
            return False
        self._out.start_call(name)
        self._arguments = Arguments(self._out)
        return True

    def push(self, character: str) -> None:
        """One more character of the arguments."""
        assert self._arguments is not None, "start() comes first"
        self._arguments.push(character)

    def give_up(self) -> None:
        """No call, unless it was shown as one: content."""
        if not self.has_started:
            for is_marker, text in self._markers_and_text:
                (self._out.marker if is_marker else self._out.content)(text)


class MistralGrammar:
    """[TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...] or [TOOL_CALLS]f[ARGS]{...}, with [CALL_ID] between."""

    is_reasoning = False

    def __init__(self, out: DeltaBuffer) -> None:
        self._out = out
        self._call: NamedCall | None = None
        self._object: CallObject | None = None
        self._list = ""  # what came of a list before its first call; a comma after one
        self._is_in_list = False
        self._name = ""

    def text(self, text: str) -> None:
        """As Grammar."""
        for at, character in enumerate(text):
            if self._out.is_done:
                return
            if self._object is not None:
                self._push_object(self._object, character)
            elif self._is_in_list:
                self._push_list(character)
            elif self._call is not None:
                self._push_call(self._call, character)
            else:
                self._out.content(text[at:])
                return

    def marker(self, marker: str) -> None:
        """As Grammar."""
        is_shown = marker not in self._out.options.hidden
        if is_shown and any(one is not None and one.is_in_string for one in (self._object, self._call)):
            self.text(marker)
        elif marker == _CALLS:
            self._give_up()
            self._call = NamedCall(self._out, marker)
        elif self._call is None or self._call.has_started or self._object is not None or self._is_in_list:
            self._give_up()
            self._out.marker(marker)
        else:
            self._name = self._name or self._call.header.strip()
            self._call.note(marker, is_marker=True)
            if marker == _ARGS and not self._call.start(self._name):
                self._give_up()

    def end(self) -> None:
        """As Grammar."""
        self._give_up()

    def _push_call(self, call: NamedCall, character: str) -> None:
        if call.has_started:
            self._push_arguments(call, character)
            return
        header = call.header.strip()
        if character == "[" and not (header or self._name):
            self._is_in_list, self._list = True, character
        elif character == "{" and header and not self._name and call.start(header):
            self._push_arguments(call, character)  # the marker between them was left out
        else:
            call.note(character)
            if character in "{}[]":
                self._give_up()

    def _push_arguments(self, call: NamedCall, character: str) -> None:
        call.push(character)
        if call.reading is not Reading.OPEN:
            self._give_up()
        if call.reading is Reading.BROKEN:
            self._out.content(character)

    def _push_list(self, character: str) -> None:
        self._list += character
        has_calls = self._call is None  # the first one took it
        if character == "{" and (not has_calls or "," in self._list):
            self._object = CallObject(self._out)
            self._push_object(self._object, character)
        elif character == "]" and has_calls and "," not in self._list:
            self._is_in_list, self._list = False, ""
        elif not (character.isspace() or (character == "," and has_calls and self._list.count(",") == 1)):
            self._give_up()

    def _push_object(self, one: CallObject, character: str) -> None:
        one.push(character)
        if one.has_started:
            self._call, self._list = None, ""
        if one.reading is Reading.DONE:
            self._object = None
        elif one.reading is Reading.BROKEN:
            is_used = not one.has_started
            self._give_up()
            if not is_used:
                self._out.content(character)

    def _give_up(self) -> None:
        """Whatever was no call is content."""
        call, one, before = self._call, self._object, self._list
        self._call = self._object = None
        self._list = self._name = ""
        self._is_in_list = False
        if call is not None:
            call.give_up()
        if one is not None and not one.has_started:
            self._out.content(before[:-1] + one.raw)  # its bracket is in both
        else:
            self._out.content(before)


class DeepSeekGrammar:
    """Calls between markers: kind, separator, name and fenced arguments (V3, R1), or name, separator, arguments."""

    is_reasoning = False

    def __init__(self, out: DeltaBuffer) -> None:
        self._out = out
        self._call: NamedCall | None = None
        self._before = ""  # the text before the separator; empty: it did not come yet
        self._ignored = ""  # characters that mean nothing where they stand between calls
        self._opening = ""  # the marker of all calls and spaces after it, until the first one has started

    def text(self, text: str) -> None:
        """As Grammar."""
        for at, character in enumerate(text):
            if self._out.is_done:
                return
            if self._call is not None:
                self._push(self._call, character)
            elif self._opening and character.isspace():
                self._opening += character
            elif character not in self._ignored:
                self._release()
                self._out.content(text[at:])
                return

    def marker(self, marker: str) -> None:
        """As Grammar."""
        call = self._call
        if call is not None and call.is_in_string and marker not in self._out.options.hidden:
            self.text(marker)
        elif marker == _SEPARATOR and call is not None and not (call.has_started or self._before):
            self._before = call.header.strip()
            call.note(marker, is_marker=True)
        else:
            is_expected = bool(self._ignored) or (call is not None and call.has_started)
            self._give_up()
            if marker == _BEGIN:
                self._call = NamedCall(self._out, marker)
            elif marker == _ALL_BEGIN:
                self._release()
                self._opening = marker
            elif is_expected and marker in (_END, _ALL_END):
                self._ignored = _SPACES
            else:
                self._release()
                self._out.marker(marker)

    def end(self) -> None:
        """As Grammar."""
        self._give_up()
        self._release()

    def _push(self, call: NamedCall, character: str) -> None:
        if not call.has_started and not self._begin(call, character):
            return
        call.push(character)
        if call.reading is not Reading.OPEN:
            self._call, self._before = None, ""
            self._ignored = _SPACES + "`" if call.reading is Reading.DONE else ""
        if call.reading is Reading.BROKEN:
            self._out.content(character)

    def _begin(self, call: NamedCall, character: str) -> bool:
        """Whether this character is the first of the arguments."""
        name, is_expected = self._before, bool(self._before)
        if call.header:
            name, _, fence = call.header.partition("\n")
            is_expected = self._before == "function" and fence == _FENCE
        if character == "{" and is_expected and call.start(name.strip()):
            self._opening = ""
            return True
        call.note(character)
        if character == "{":
            self._give_up()
        return False

    def _give_up(self) -> None:
        """A call that did not start is content."""
        call, self._call, self._before = self._call, None, ""
        if call is not None and not call.has_started:
            self._release()
            call.give_up()

    def _release(self) -> None:
        """No call follows the marker that opens them."""
        opening, self._opening, self._ignored = self._opening, "", ""
        if opening:
            self._out.marker(_ALL_BEGIN)
            self._out.content(opening.removeprefix(_ALL_BEGIN))
