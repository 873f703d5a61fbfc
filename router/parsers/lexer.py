"""Cuts a growing text into markers and what is between them. Knows no family's grammar."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Marker:
    """One of the markers, whole."""

    text: str


class Lexer:
    """Holds back what may become a marker. No marker begins with another one."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(markers)
        self._pattern = re.compile("|".join(map(re.escape, self._markers))) if self._markers else None
        self._first_characters = tuple({marker[0] for marker in self._markers})
        self._held = ""

    def push(self, text: str) -> Iterator[Marker | str]:
        """The markers and texts that are certain now; to be read to the end."""
        text, at = self._held + text, 0
        if self._pattern is not None:
            for found in self._pattern.finditer(text):
                if found.start() > at:
                    yield text[at : found.start()]
                yield Marker(found.group())
                at = found.end()
        end = len(text) - self._num_held(text[at:])
        self._held = text[end:]
        if end > at:
            yield text[at:end]

    def _num_held(self, text: str) -> int:
        """Length of the longest end that may become a marker."""
        if not any(character in text for character in self._first_characters):  # as of most texts
            return 0
        return max(overlap(text, marker) for marker in self._markers)

    def finish(self) -> str:
        """What was held back is no marker."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of a text that a marker or a stop text, longer than it, begins with."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[len(text) - length :]):
            return length
    return 0
