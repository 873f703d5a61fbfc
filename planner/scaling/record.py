"""Decisions as JSON lines, and making them again: the same observations must give the same plans.

A line is a start (the configuration, and the state that the next decision begins with) or a decision (an observation,
and what was decided). There is a start where a decision does not begin with what the one before it left: at the
beginning of a file, and after another autoscaler has decided. A file begun by a newer version is refused by the name
of the unknown key. The only module of planner.scaling that touches files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from planner.scaling.config import AutoscalingConfig
from planner.scaling.decide import ScalingState, decide
from planner.scaling.observation import Observation
from planner.scaling.plan import Explanation, Plan
from planner.scaling.rollout import RolloutState
from settings.loading import SettingsError, build

T = TypeVar("T")


class RecordError(Exception):
    """A line that cannot be read; the message has its number."""


@dataclass(frozen=True, slots=True)
class Start:
    """What the next decision begins with."""

    config: AutoscalingConfig
    state: ScalingState


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision."""

    now_s: float
    """Unix time."""
    observation: Observation
    plan: Plan
    explanation: Explanation


@dataclass(frozen=True, slots=True)
class Saved:
    """All that an autoscaler keeps over a restart: written with to_line, read with saved_from_line."""

    scaling: ScalingState = field(default_factory=ScalingState)
    rollout: RolloutState = field(default_factory=RolloutState)


@dataclass(frozen=True, slots=True)
class Difference:
    """A decision that comes out differently."""

    line: int
    recorded: Plan
    replayed: Plan


# ---- writing


def to_line(value: Start | DecisionRecord | Saved) -> str:
    """One line of JSON without its end. NaN is written as NaN: a record has what was observed."""
    return json.dumps({_KINDS[type(value)]: dataclasses.asdict(value)}, separators=(",", ":"))


class LineWriter:
    """Decisions as lines that can be made again."""

    def __init__(self, start_every: int = 0) -> None:
        self._start_every = start_every
        self._after: ScalingState | None = None
        self._num_since_start = 0

    def lines(self, start: Start, record: DecisionRecord, after: ScalingState) -> list[str]:
        """Of a decision, what it began with, and what it left to the next one. The start is among them where it is not
        what the last decision left, as after a restart, and after start_every decisions (0: not for that)."""
        is_due = 0 < self._start_every <= self._num_since_start
        lines = [to_line(record)]
        if start.state is not self._after or is_due:  # equal ones may differ in a NaN
            lines.insert(0, to_line(start))
            self._num_since_start = 0
        self._num_since_start += 1
        self._after = after
        return lines

    def begin_anew(self) -> None:
        """What is written next begins with a start."""
        self._after = None


class DecisionLog:
    """Appends decisions to a file. A full one is renamed to NAME.1, in place of an older one, and a new one begun.

    Raises OSError, also when a path cannot be written to at all.
    """

    def __init__(self, path: Path, max_bytes: int = 64 * 2**20) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._writer = LineWriter()
        path.open("ab").close()

    def write(self, start: Start, record: DecisionRecord, after: ScalingState) -> None:
        """Append one decision; see LineWriter."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size >= self._max_bytes:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        if not 0 < size < self._max_bytes:
            self._writer.begin_anew()
        try:
            for line in self._writer.lines(start, record, after):
                self._append(line)
        except OSError:
            self._writer.begin_anew()
            raise

    def _append(self, line: str) -> None:
        with self._path.open("a+b") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - 1))
            torn = end > 0 and file.read(1) != b"\n"  # the writer died within a line
            file.write(b"\n" * torn + line.encode() + b"\n")


# ---- reading


def saved_from_line(line: str) -> Saved:
    """What to_line wrote. Raises RecordError."""
    read = _read(line, 1)
    if not isinstance(read, Saved):
        raise RecordError("line 1: no saved state")
    return read


def decisions(lines: Iterable[str]) -> Iterator[DecisionRecord]:
    """The decisions of a file, oldest first. Raises RecordError."""
    return (read for _, read in _entries(lines) if isinstance(read, DecisionRecord))


def from_first_start(lines: Sequence[str]) -> list[str]:
    """Without the decisions at the beginning that cannot be made again, because their start is gone."""
    first = next((i for i, line in enumerate(lines) if line.startswith('{"start"')), len(lines))
    return list(lines[first:])


def replay(lines: Iterable[str]) -> Iterator[Difference]:
    """Make the decisions of a file again; yields those whose plans differ. Raises RecordError."""
    start, state = None, ScalingState()
    for number, read in _entries(lines):
        if isinstance(read, Start):
            start, state = read, read.state
        elif isinstance(read, DecisionRecord):
            if start is None:
                raise RecordError(f"line {number}: a decision before the start that says with which configuration")
            plan, state, _ = decide(read.observation, state, read.now_s, start.config)
            if plan != read.plan:
                yield Difference(number, read.plan, plan)


def _entries(lines: Iterable[str]) -> Iterator[tuple[int, Start | DecisionRecord | Saved]]:
    """Every line with its number. The last line before a start or before the end may be torn, and is left out."""
    torn: RecordError | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            read = _read(line, number)
        except _NotJson as error:
            torn = torn or error
            continue
        if torn is not None and not isinstance(read, Start):
            raise torn
        torn = None
        yield number, read


class _NotJson(RecordError):
    """Perhaps a line that was not written to its end."""


_KINDS: dict[type, str] = {Start: "start", DecisionRecord: "decision", Saved: "saved"}


def _read(line: str, number: int) -> Start | DecisionRecord | Saved:
    try:
        raw: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise _NotJson(f"line {number}: not JSON ({error.msg})") from None
    match raw:
        case {"start": dict(content)}:
            return _build(Start, content, number)
        case {"decision": dict(content)}:
            return _build(DecisionRecord, content, number)
        case {"saved": dict(content)}:
            return _build(Saved, content, number)
    raise RecordError(f"line {number}: neither a start nor a decision")


def _build(expected: type[T], raw: dict[str, Any], number: int) -> T:
    try:
        return build(expected, raw, f"line {number}")
    except SettingsError as error:
        raise RecordError(str(error)) from None
