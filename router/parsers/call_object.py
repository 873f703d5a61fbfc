"""One tool call as a JSON object, read character by character: {"name": "f", "arguments": {...}}.

The arguments are passed on as they are written, once the name is known. Knows nothing of what surrounds the object.
"""

from __future__ import annotations

import enum
import json

from router.parsers.deltas import DeltaBuffer

_SPACES = " \t\r\n"
_CLOSING = {"{": "}", "[": "]"}
_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset((*_ARGUMENTS, "name", "id", "type"))


class Reading(enum.Enum):
    """How far a reading came."""

    OPEN = "open"
    DONE = "done"
    BROKEN = "broken"  # this character cannot follow


class JsonObject:
    """Finds the end of a JSON object, or of an array, whose first bracket comes first.

    Brackets and strings are read; what is between them is not checked, since it was shown when its end comes.
    """

    def __init__(self) -> None:
        self._closing: list[str] = []
        self.is_in_string = False
        self._is_escaped = False

    def push(self, character: str) -> Reading:
        """One more."""
        if self.is_in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self.is_in_string = False
        elif character == '"' and self._closing:
            self.is_in_string = True
        elif character in _CLOSING:
            self._closing.append(_CLOSING[character])
        elif character in "}]":
            if not self._closing or self._closing.pop() != character:
                return Reading.BROKEN
            return Reading.OPEN if self._closing else Reading.DONE
        elif not self._closing:
            return Reading.BROKEN
        return Reading.OPEN


class Arguments:
    """The arguments of a call that has started: an object, shown as it comes; spaces before it are left out."""

    def __init__(self, out: DeltaBuffer) -> None:
        self._out = out
        self._object: JsonObject | None = None
        self.reading = Reading.OPEN

    @property
    def is_in_string(self) -> bool:
        """Whether a marker would be part of a string now."""
        return self._object is not None and self._object.is_in_string and self.reading is Reading.OPEN

    def push(self, character: str) -> None:
        """One more; to be called while the reading is open. The character that breaks it is not shown."""
        if self._object is None:
            if character in _SPACES:
                return
            if character != "{":
                self.reading = Reading.BROKEN
                return
            self._object = JsonObject()
        self.reading = self._object.push(character)
        if self.reading is not Reading.BROKEN:
            self._out.arguments(character)
        if self.reading is Reading.DONE:
            self._out.end_call()


class _At(enum.Enum):
    START = "start"
    KEY = "key"  # or the end, of an empty object
    NEXT_KEY = "next_key"
    COLON = "colon"
    VALUE = "value"
    COMMA = "comma"  # or the end


class CallObject:
    """The object. While has_started is False nothing of it was shown; `raw` then is all that must become content."""

    def __init__(self, out: DeltaBuffer) -> None:
        self._out = out
        self._at = _At.START
        self._raw: list[str] = []
        self._key = ""
        self._scalar: list[str] = []  # of the string or number that is being read
        self._is_escaped = False
        self._value: JsonObject | None = None
        self._name: str | None = None
        self._held_arguments: list[str] = []  # that came before the name
        self._has_arguments = False
        self.has_started = False
        self.reading = Reading.OPEN

    @property
    def raw(self) -> str:
        """All characters so far."""
        return "".join(self._raw)

    @property
    def is_in_string(self) -> bool:
        """Whether a marker would be part of a string now."""
        if self.reading is not Reading.OPEN:
            return False
        if self._value is not None:
            return self._value.is_in_string
        return bool(self._scalar) and self._scalar[0] == '"'

    def push(self, character: str) -> None:
        """One more; to be called while the reading is open. After a start, the character that breaks it is not used."""
        if not self.has_started:
            self._raw.append(character)
        if self._value is not None:
            self._push_container(character)
        elif self._scalar:
            self._push_scalar(character)
        elif character not in _SPACES:
            self._push_between(character)

    def _push_between(self, character: str) -> None:
        at = self._at
        if at is _At.START and character == "{":
            self._at = _At.KEY
        elif at in (_At.KEY, _At.NEXT_KEY) and character == '"':
            self._scalar = [character]
        elif at is _At.COLON and character == ":":
            self._at = _At.VALUE
        elif at is _At.VALUE:
            self._begin_value(character)
        elif at is _At.COMMA and character == ",":
            self._at = _At.NEXT_KEY
        elif at in (_At.KEY, _At.COMMA) and character == "}":
            self._end()
        else:
            self.reading = Reading.BROKEN

    def _begin_value(self, character: str) -> None:
        if character in _CLOSING:
            if self._key in _ARGUMENTS and character == "[":
                self.reading = Reading.BROKEN
                return
            self._value = JsonObject()
            self._push_container(character)
        elif character in ",:}]":
            self.reading = Reading.BROKEN
        else:
            self._scalar = [character]

    def _push_container(self, character: str) -> None:
        assert self._value is not None, "looked at before"
        reading = self._value.push(character)
        if reading is Reading.BROKEN:
            self.reading = reading
            return
        if self._key in _ARGUMENTS:
            self._has_arguments = True
            self._show(character)
        if reading is Reading.DONE:
            self._value, self._at = None, _At.COMMA

    def _push_scalar(self, character: str) -> None:
        """A string, up to its end; or a number or a word, which what follows ends."""
        is_string = self._scalar[0] == '"'
        if not is_string and character in _SPACES + ",}":
            self._end_scalar()
            if self.reading is Reading.OPEN and character not in _SPACES:
                self._push_between(character)
            return
        self._scalar.append(character)
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif is_string and character == '"':
            self._end_scalar()

    def _end_scalar(self) -> None:
        text, self._scalar = "".join(self._scalar), []
        try:
            value = json.loads(text)
        except ValueError:
            self.reading = Reading.BROKEN
            return
        if self._at is not _At.VALUE:
            self._key, self._at = value, _At.COLON
            if value not in _KEYS or (value in _ARGUMENTS and self._has_arguments):
                self.reading = Reading.BROKEN
            return
        self._at = _At.COMMA
        if self._key == "name":
            self._take_name(value)
        elif self._key in _ARGUMENTS:
            self._take_argument_text(value)

    def _take_name(self, value: object) -> None:
        if self._name is not None or value not in self._out.options.names:
            self.reading = Reading.BROKEN
            return
        assert isinstance(value, str), "it is one of the names"
        self._name = value
        held, self._held_arguments = "".join(self._held_arguments), []
        if held:
            self._show(held)

    def _take_argument_text(self, value: object) -> None:
        """Some models write the arguments as a string of JSON, or null for none."""
        try:
            is_object = isinstance(value, str) and isinstance(json.loads(value), dict)
        except (ValueError, RecursionError):
            is_object = False
        if value is not None and not is_object:
            self.reading = Reading.BROKEN
            return
        self._has_arguments = True
        self._show(str(value) if is_object else "{}")

    def _show(self, text: str) -> None:
        if self._name is None:
            self._held_arguments.append(text)
            return
        if not self.has_started:
            self.has_started = True
            self._raw.clear()
            self._out.start_call(self._name)
        self._out.arguments(text)

    def _end(self) -> None:
        if self._name is None:
            self.reading = Reading.BROKEN
            return
        if not self._has_arguments:
            self._show("{}")
        self.reading = Reading.DONE
        self._out.end_call()
