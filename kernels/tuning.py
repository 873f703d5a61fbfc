"""Launch configurations from tables: `configs/OP.json`, a list of {"shape": {...}, "config": {...}}.

The nearest shape wins, by the sum of the distances of its sizes in powers of two; a size that a launcher names and a
row does not is a mistake in the table. Each row says where it comes ("from"): measured on a named device, or "paper",
chosen by what the compiler says of it. A launch never measures anything itself: that would break graph capture, and two
workers would differ. Knows nothing of any operation.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from pathlib import Path

_TABLES = Path(__file__).with_name("configs")
_Answer = Callable[[str, dict[str, int]], Mapping[str, int]]
_answer: ContextVar[_Answer | None] = ContextVar("answer", default=None)


def config_for(op: str, **shape: int) -> Mapping[str, int]:
    """The row of `configs/{op}.json` whose shape is nearest. Raises KeyError or OSError for a table that is wrong."""
    answer = _answer.get()
    return _nearest(op, tuple(sorted(shape.items()))) if answer is None else answer(op, shape)


@contextlib.contextmanager
def answered_by(answer: _Answer) -> Iterator[None]:
    """Inside, `answer(op, shape)` replaces the tables: for a search of better rows."""
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


@cache
def _nearest(op: str, shape: tuple[tuple[str, int], ...]) -> Mapping[str, int]:
    def distance(row: Mapping[str, Mapping[str, int]]) -> float:
        return sum(abs(math.log2(max(1, size) / max(1, row["shape"][name]))) for name, size in shape)

    rows = json.loads((_TABLES / f"{op}.json").read_text(encoding="utf-8"))
    config: Mapping[str, int] = min(rows, key=distance)["config"]
    return config
