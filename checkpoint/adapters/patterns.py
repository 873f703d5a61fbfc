"""Regular expressions out of an adapter's config: which are safe to match against the names of modules.

`re` backtracks, and holds the interpreter meanwhile: a pattern that can match one name in very many ways would stop a
router. So the ways are counted from the parsed pattern, generously, and bounded. Knows nothing of configs or tensors.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from re import _constants as sre  # type: ignore[attr-defined]  # no public module has the parsed pattern
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MAX_NAME_CHARACTERS = 200  # of a module's name
MAX_PATTERN_CHARACTERS = 1000
_ASCII = 128
_MAX_GROUPS = 50  # each within the other, they are far from the interpreter's limit of recursion
_MAX_WAYS = 1 << 24  # to match one name: three .* and a few alternatives; a match then takes milliseconds

_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)


def problem_of(pattern: str, around: str = "{}") -> str:
    """Why a pattern is refused; empty: it is not. around: what it is matched within, with {} in its place."""
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return f"has {len(pattern)} characters; at most {MAX_PATTERN_CHARACTERS} are taken"
    if pattern.count("(") > _MAX_GROUPS:
        return f"has {pattern.count('(')} brackets; at most {_MAX_GROUPS} are taken"
    whole = around.format(pattern)
    try:
        re.compile(pattern)
        re.compile(whole)
        ways = _ways(_parser.parse(whole))
    except (re.error, OverflowError) as error:
        return f"is not a regular expression ({ascii(str(error))[1:-1]})"
    except _Nested as error:
        return str(error)
    return "" if ways <= _MAX_WAYS else "can match a name in too many ways: it has too many repeats or alternatives"


class _Nested(Exception):
    """A repeat that can go over the same characters in exponentially many ways."""


def _ways(items: Sequence[tuple[Any, Any]]) -> int:
    """At most so many ways to match a sequence from one place of a name."""
    return math.prod(_ways_of(op, argument) for op, argument in items)


def _ways_of(op: Any, argument: Any) -> int:
    if op in _REPEATS:
        return _ways_of_repeat(*argument)
    if op is sre.BRANCH:
        return _ways_of_branch(argument[1])
    if op is sre.SUBPATTERN:
        return _ways(argument[3])
    if op in (sre.ASSERT, sre.ASSERT_NOT):
        return _ways(argument[1])
    if op is sre.ATOMIC_GROUP:
        return _ways(argument)
    if op is sre.GROUPREF_EXISTS:
        return sum(_ways(branch) for branch in argument[1:] if branch is not None)
    return 1  # one character, a position, or what a group has matched


def _ways_of_repeat(first: int, last: Any, body: Sequence[tuple[Any, Any]]) -> int:
    if first > MAX_NAME_CHARACTERS:
        raise _Nested(f"repeats something at least {first} times; a name has at most {MAX_NAME_CHARACTERS} characters")
    ways = _ways(body)
    if last <= 1:
        return ways + (first == 0)
    if ways > 1 or _has_repeat(body):
        raise _Nested("has a repeat or alternatives within a repeat, which can match a name in too many ways")
    return int(min(last, MAX_NAME_CHARACTERS)) - first + 1


def _has_repeat(items: Any) -> bool:
    """Also of a fixed count, in whatever is nested."""
    if isinstance(items, tuple) and items and any(items[0] is op for op in _REPEATS):  # a group's number may equal one
        return True
    is_parsed = isinstance(items, (tuple, list, _parser.SubPattern))
    return is_parsed and any(_has_repeat(item) for item in items)


def _ways_of_branch(branches: Sequence[Any]) -> int:
    """Of different words no more match at one place than begin each other. Case is passed over, as (?i) does."""
    plain = [all(op is sre.LITERAL and code < _ASCII for op, code in branch) for branch in branches]
    words = ["".join(chr(code) for _, code in branch).lower() for branch in itertools.compress(branches, plain)]
    others = sum(_ways(branch) for branch, is_word in zip(branches, plain, strict=True) if not is_word)
    return others + max((sum(word.startswith(other) for other in words) for word in words), default=0)
