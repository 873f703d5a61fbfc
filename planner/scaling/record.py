"""Decisions as JSON lines, and making them again: the same observations must give the same plans.

The first line of a file has the configuration and the state that the first decision began with; each further line has
an observation and what was decided. A file begun by a newer version is refused by the name of the unknown key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from planner.scaling.config import AutoscalingConfig
from planner.scaling.decide import ScalingState, decide
from planner.scaling.observation import Observation
from planner.scaling.plan import Explanation, Plan
from settings.loading import SettingsError, build

T = TypeVar("T")


class RecordError(Exception):
    """A line that cannot be read; the message has its number."""


@dataclass(frozen=True, slots=True)
class Start:
    """What the first decision of a file began with."""

    config: AutoscalingConfig
    state: ScalingState


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision."""

    now_s: float
    observation: Observation
    plan: Plan
    explanation: Explanation


@dataclass(frozen=True, slots=True)
class Difference:
    """A decision that comes out differently."""

    line: int
    recorded: Plan
    replayed: Plan


def to_line(value: Start | DecisionRecord | ScalingState | Plan | Explanation) -> str:
    """One line of JSON without its end. NaN is written as NaN: a record has what was observed."""
    return json.dumps(dataclasses.asdict(value), separators=(",", ":"))


def state_from_line(line: str) -> ScalingState:
    """A state that to_line wrote. Raises RecordError."""
    return _read(ScalingState, line, 1)


def replay(lines: Iterable[str]) -> Iterator[Difference]:
    """Make the decisions of a file again; yields those whose plans differ. Raises RecordError at a line that is no
    record."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    start = _read(Start, first[1], first[0])
    state = start.state
    for number, line in numbered:
        record = _read(DecisionRecord, line, number)
        plan, state, _ = decide(record.observation, state, record.now_s, start.config)
        if plan != record.plan:
            yield Difference(number, record.plan, plan)


def _read(expected: type[T], line: str, number: int) -> T:
    try:
        raw: Any = json.loads(line)
        if not isinstance(raw, dict):
            raise RecordError(f"line {number}: not an object")
        return build(expected, raw, f"line {number}")
    except json.JSONDecodeError as error:
        raise RecordError(f"line {number}: not JSON ({error.msg})") from None
    except SettingsError as error:
        raise RecordError(str(error)) from None
