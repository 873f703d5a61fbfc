"""Which layers an adapter changes, by layers_to_transform and layers_pattern, as PEFT takes them."""

from __future__ import annotations

import re
from dataclasses import dataclass

AROUND_PATTERN = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."  # what PEFT matches one of layers_pattern within
_ANY_PATTERN = r".*?\.[^.]*\.(?P<idx>\d+)\."  # without layers_pattern: the first number in the name


@dataclass(frozen=True, slots=True)
class ChosenLayers:
    """The layers whose modules are targets, where target_modules has ends of names."""

    numbers: frozenset[int]
    patterns: tuple[str, ...] = ()
    """What comes before a layer's number in a name; empty: anything may."""

    def has(self, module: str) -> bool:
        """Whether a module of this name is in one of the layers. One outside of all layers is not."""
        number = self._number(module)
        return number is not None and number in self.numbers

    def _number(self, module: str) -> int | None:
        expressions = [AROUND_PATTERN.format(pattern) for pattern in self.patterns] or [_ANY_PATTERN]
        match = next((found for each in expressions if (found := re.match(each, module))), None)
        if match is None or match["idx"] is None:  # a pattern with alternatives may match without a number
            return None
        return int(match["idx"])
